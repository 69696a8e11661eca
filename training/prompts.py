"""Prompts to distil on, of the four kinds the drafter is measured on: chat, code, story, edit.

Everything here is either written for this project or sampled from the target itself, so the training data has no
licence but the target's own (SmolLM2-135M-Instruct, Apache-2.0). The measured prompts (`specdec_kernels/cli/prompts.py`)
are not among them.
"""

from __future__ import annotations

import random

TOPICS = [
    "photosynthesis",
    "the water cycle",
    "compound interest",
    "how vaccines work",
    "black holes",
    "the French Revolution",
    "healthy sleep",
    "writing a cover letter",
    "learning a language",
    "renewable energy",
    "volcanoes",
    "the human heart",
    "gravity",
    "recycling at home",
    "time management",
    "the Roman Empire",
    "how bread rises",
    "public speaking",
    "the immune system",
    "supply and demand",
    "coral reefs",
    "choosing a bicycle",
    "the printing press",
    "machine learning",
    "planting a garden",
    "earthquakes",
    "saving money",
    "the moon landing",
    "how airplanes fly",
    "meditation",
    "the Silk Road",
    "making coffee",
    "electric cars",
    "bees and pollination",
    "the stock market",
    "first aid for burns",
    "jazz music",
    "the Great Wall of China",
    "databases",
    "friendship",
    "a balanced diet",
    "migration of birds",
    "how to study for exams",
    "the internet",
    "climate and weather",
    "planning a trip to Italy",
    "chess openings",
    "job interviews",
]
QUESTIONS = [
    "Explain {} in simple terms.",
    "What are the main ideas behind {}?",
    "Give me five tips about {}.",
    "Why does {} matter?",
    "Write a short paragraph about {}.",
    "What is a common misunderstanding about {}?",
    "Summarise {} for a ten-year-old.",
    "I am curious about {}. Where should I start?",
    "List three facts about {}.",
    "Write a short letter to a friend about {}.",
]
CODE_TASKS = [
    "reverses a string",
    "checks whether a number is prime",
    "computes the factorial of n",
    "merges two sorted lists",
    "counts the words in a text",
    "finds the largest element of a list",
    "removes duplicates from a list",
    "checks whether a string is a palindrome",
    "computes the n-th Fibonacci number",
    "sorts a list with bubble sort",
    "performs a binary search",
    "reads a CSV file",
    "flattens a nested list",
    "converts Celsius to Fahrenheit",
    "counts the vowels in a string",
    "computes the greatest common divisor",
    "rotates a list by k",
    "transposes a matrix",
    "validates an email address",
    "finds the most common element",
    "sums the digits of a number",
    "implements a stack",
    "implements a queue",
    "computes the mean and median",
    "generates a random password",
    "parses a date",
    "finds all pairs with a given sum",
    "checks balanced parentheses",
    "capitalises every word",
    "multiplies two matrices",
    "computes the power of a number",
    "inverts a dictionary",
    "reads a JSON file",
    "draws a multiplication table",
]
CODE_ASKS = [
    "Write a Python function that {}.",
    "Write a Python function that {} and explain it.",
    "Show me Python code that {}.",
    "Write a Python class or function that {}, with a docstring.",
    "In JavaScript, write a function that {}.",
    "Write a Python program that {} and prints the result.",
]
NAMES = [
    "Mara",
    "Tom",
    "Elena",
    "Old Joseph",
    "Priya",
    "Captain Reed",
    "Lina",
    "the miller",
    "Samuel",
    "Aunt Rose",
    "Nils",
    "the young queen",
]
PLACES = [
    "a village by the sea",
    "the edge of a dark forest",
    "an old lighthouse",
    "a crowded market",
    "a snowbound train",
    "a house with a red door",
    "the last library in the city",
    "a small island",
    "the foot of the mountain",
    "a quiet harbour",
]
EVENTS = [
    "a letter arrived without a name",
    "the bells began to ring by themselves",
    "a stranger asked for shelter",
    "the river ran backwards",
    "a map was found under the floor",
    "the lamp went out",
    "someone had left a key",
    "a fox spoke",
    "the storm broke the bridge",
    "the clock stopped at noon",
    "a child went missing",
    "the garden bloomed in winter",
]
STORY_ASKS = [
    "Continue this story: {}",
    "Write the next part of this story.\n\n{}",
    "{} Continue the story.",
    "Here is the beginning of a story. Please go on.\n\n{}",
]
EDIT_ASKS = [
    "Correct the spelling in this text. Return only the corrected text.\n\n{}",
    "Fix the typos in the following text and return the whole text:\n\n{}",
    "Return this text with its spelling corrected.\n\n{}",
    "Repeat the following text exactly:\n\n{}",
    "Proofread this text and give me the corrected version:\n\n{}",
]


def chat(rng: random.Random) -> str:
    return rng.choice(QUESTIONS).format(rng.choice(TOPICS))


def code(rng: random.Random) -> str:
    return rng.choice(CODE_ASKS).format(rng.choice(CODE_TASKS))


def story(rng: random.Random) -> str:
    opening = f"{rng.choice(NAMES)} lived in {rng.choice(PLACES)}. One evening {rng.choice(EVENTS)}"
    opening = (
        opening[0].upper() + opening[1:] + rng.choice([".", ", and nobody knew why.", ". It was only the beginning."])
    )
    return rng.choice(STORY_ASKS).format(opening)


def misspell(text: str, rng: random.Random, rate: float = 0.12) -> str:
    """Swap, drop or double one letter in about `rate` of the longer words."""
    words = text.split(" ")
    for index, word in enumerate(words):
        if len(word) > 3 and word.isalpha() and rng.random() < rate:
            at = rng.randrange(1, len(word) - 1)
            words[index] = rng.choice(
                [
                    word[:at] + word[at + 1] + word[at] + word[at + 2 :],
                    word[:at] + word[at + 1 :],
                    word[:at] + word[at] + word[at:],
                ]
            )
    return " ".join(words)


def edit(text: str, rng: random.Random) -> str:
    """A request to correct `text` (an earlier answer of the target), misspelled."""
    return rng.choice(EDIT_ASKS).format(misspell(text, rng))
