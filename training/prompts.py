"""Prompts to distil on, of the four kinds the drafter is measured on: chat, code, story, edit.

Everything here is either written for this project or sampled from the target itself, so the training data has no
licence but the target's own (SmolLM2-135M-Instruct, Apache-2.0). The measured prompts (`specdec_kernels/cli/prompts.py`)
are not among them.
"""

from __future__ import annotations

import random


def _items(text: str) -> list[str]:
    """What semicolons separate, over any number of lines."""
    return text.strip().replace("\n", " ").split("; ")


TOPICS = _items("""
photosynthesis; the water cycle; compound interest; how vaccines work; black holes; the French Revolution; healthy
sleep; writing a cover letter; learning a language; renewable energy; volcanoes; the human heart; gravity; recycling
at home; time management; the Roman Empire; how bread rises; public speaking; the immune system; supply and demand;
coral reefs; choosing a bicycle; the printing press; machine learning; planting a garden; earthquakes; saving money;
the moon landing; how airplanes fly; meditation; the Silk Road; making coffee; electric cars; bees and pollination;
the stock market; first aid for burns; jazz music; the Great Wall of China; databases; friendship; a balanced diet;
migration of birds; how to study for exams; the internet; climate and weather; planning a trip to Italy; chess
openings; job interviews; tides; the periodic table; how glass is made; the Cold War; mindfulness at work; adopting
a dog; writing poetry; ancient Egypt; how batteries work; glaciers; budgeting for a family; the human brain;
magnetism; the history of writing; rainforests; fermentation; running a first marathon; the solar system; insurance;
how a camera works; the Renaissance; stretching after exercise; tea; the nervous system; wind power; keeping
houseplants alive; the Industrial Revolution; probability; origami; how bridges stand; good manners at dinner; owls;
credit cards; the Vikings; the scientific method; making new friends in a new city; soap; elections; how the eye
sees; desert animals; classical music; packing for a long hike; the Olympic Games; cells; negotiating a salary;
sourdough; comets; the history of zero; taking better notes; swimming; the Black Death; how computers store numbers;
watercolour painting; sleep in teenagers; whales; mortgages; the theatre of Shakespeare; knitting; how elevators
work; the United Nations; dealing with stress; maps; spices; the stars of the northern sky; yoga; inflation; the
telephone; urban parks; writing a thank-you note; salt; evolution; folk tales; hand washing; railways; caring for
old books; how rainbows form; teamwork; penguins; the metric system; cooking rice; remote work; dinosaurs; learning
the guitar; the Amazon river; reading to children; lighthouses; how money was invented; birdwatching; the ozone
layer; pottery; moving house; cheese; the planet Mars
""")
QUESTIONS = _items("""
Explain {} in simple terms.; What are the main ideas behind {}?; Give me five tips about {}.; Why does {} matter?;
Write a short paragraph about {}.; What is a common misunderstanding about {}?; Summarise {} for a ten-year-old.; I
am curious about {}. Where should I start?; List three facts about {}.; Write a short letter to a friend about {}.;
What would a beginner want to know about {}?; Write a poem about {}.; Compare what people believed about {} a
hundred years ago with what we know today.; Make a small quiz about {} with answers.; Write an introduction for a
blog post about {}.; What are the advantages and disadvantages of {}?; Tell me something surprising about {}.; Write
a short dialogue between a teacher and a student about {}.; How has {} changed over time?; Describe {} in three
sentences, then in one.
""")
CODE_TASKS = _items("""
reverses a string; checks whether a number is prime; computes the factorial of n; merges two sorted lists; counts
the words in a text; finds the largest element of a list; removes duplicates from a list; checks whether a string is
a palindrome; computes the n-th Fibonacci number; sorts a list with bubble sort; performs a binary search; reads a
CSV file; flattens a nested list; converts Celsius to Fahrenheit; counts the vowels in a string; computes the
greatest common divisor; rotates a list by k; transposes a matrix; validates an email address; finds the most common
element; sums the digits of a number; implements a stack; implements a queue; computes the mean and median;
generates a random password; parses a date; finds all pairs with a given sum; checks balanced parentheses;
capitalises every word; multiplies two matrices; computes the power of a number; inverts a dictionary; reads a JSON
file; draws a multiplication table; finds the second largest number; checks whether two strings are anagrams;
converts a number to binary; converts a Roman numeral to an integer; splits a list into chunks of n; computes prime
numbers up to n; implements a linked list; implements merge sort; implements quick sort; finds the longest word in a
sentence; counts how often each letter occurs; removes punctuation from a text; computes the area of a circle;
computes the distance between two points; shuffles a list; finds the missing number in a sequence; computes compound
interest; checks whether a year is a leap year; prints a triangle of stars; finds common elements of two lists;
encodes text with a Caesar cipher; builds a binary tree and walks it; finds the shortest path in a grid; writes
lines to a file; downloads a web page; measures the time a function takes; caches the results of a function;
validates a password; computes a running average; converts a list of pairs to a dictionary; finds the index of an
element; removes empty strings from a list; sorts a list of dictionaries by a key; groups numbers into even and odd;
computes the sum of squares; simulates rolling two dice; plays rock, paper, scissors; keeps a to-do list; counts
lines in a file; formats a number with commas; finds the longest common prefix; generates all permutations of a
list; computes the dot product of two vectors; solves a quadratic equation; converts minutes to hours and minutes;
replaces words in a sentence; checks whether a list is sorted; interleaves two lists; finds the median of two sorted
arrays; implements a simple calculator; models a library of books; models a shopping cart
""")
CODE_ASKS = _items("""
Write a Python function that {}.; Write a Python function that {} and explain it.; Show me Python code that {}.;
Write a Python class or function that {}, with a docstring.; In JavaScript, write a function that {}.; Write a
Python program that {} and prints the result.; How would you write a function in C that {}?; Write a Python function
that {}, with type hints and two tests.; Give me a short and a fast version of Python code that {}.; Write a Java
method that {}.
""")
NAMES = _items("""
Mara; Tom; Elena; Old Joseph; Priya; Captain Reed; Lina; the miller; Samuel; Aunt Rose; Nils; the young queen;
Doctor Amari; the twins; Hugo; a retired clockmaker; Yuki; the baker's daughter; Sergeant Vale; Noor; the night
watchman; Clara; a boy called Finch; the last gardener; Abel; Mrs. Larkin; the ferryman's wife; Teo; a young
painter; the innkeeper; Ines; Grandfather Wu
""")
PLACES = _items("""
a village by the sea; the edge of a dark forest; an old lighthouse; a crowded market; a snowbound train; a house
with a red door; the last library in the city; a small island; the foot of the mountain; a quiet harbour; a town
without a name; the top floor of a hotel; a farm at the end of the road; a caravan in the desert; a canal boat; the
old observatory; a street of bookshops; a valley full of fog; a school that had been closed for years; the palace
kitchens; a space station far from home; a cottage with no clocks
""")
EVENTS = _items("""
a letter arrived without a name; the bells began to ring by themselves; a stranger asked for shelter; the river ran
backwards; a map was found under the floor; the lamp went out; someone had left a key; a fox spoke; the storm broke
the bridge; the clock stopped at noon; a child went missing; the garden bloomed in winter; the stars changed their
places; a door appeared in the wall; the postman brought a box that hummed; every mirror went dark; an old friend
came back; the snow would not stop; a ship came in with no crew; the phone rang at the same minute each night; a
horse came home without its rider; the piano played one note; the well dried up; a photograph began to move; the
train did not stop; two moons rose
""")
STORY_ASKS = [
    "Continue this story: {}",
    "Write the next part of this story.\n\n{}",
    "{} Continue the story.",
    "Here is the beginning of a story. Please go on.\n\n{}",
    "Finish this story in a few paragraphs.\n\n{}",
    "{} What happened next?",
]
EDIT_ASKS = [
    "Correct the spelling in this text. Return only the corrected text.\n\n{}",
    "Fix the typos in the following text and return the whole text:\n\n{}",
    "Return this text with its spelling corrected.\n\n{}",
    "Repeat the following text exactly:\n\n{}",
    "Proofread this text and give me the corrected version:\n\n{}",
    "Rewrite this text without spelling mistakes:\n\n{}",
    "Here is my draft. Correct its spelling, change nothing else.\n\n{}",
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
