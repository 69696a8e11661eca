"""The prompts of the demo and of the measurements: four kinds, two each. None is among the training data."""

from __future__ import annotations

PROMPTS: dict[str, list[str]] = {
    "chat": [
        "What makes the sky look blue during the day and red at sunset?",
        "I have two free hours every evening. How should I use them to get fitter and read more?",
    ],
    "code": [
        "Write a Python function that groups a list of words by their first letter, with a docstring and an example.",
        "Write a Python class for a bank account with deposit, withdraw and a history of transactions.",
    ],
    "story": [
        "Continue this story: The ferry had stopped running at nine, and still someone was ringing the bell on the "
        "other side of the river.",
        "Write the next part of this story.\n\nOn the morning of her twelfth birthday, Ada found a door in the "
        "apple tree.",
    ],
    "edit": [
        "Correct the spelling in this text. Return only the corrected text.\n\nThe museum opend its new wing on Saturday. "
        "Visitors waited in a long queue outside the main entrence, and many of them had travelled from other citys. "
        "The first room shows paintings of the harbour, the secnd one shows tools that fishermen used a hundred years "
        "ago. In the last room there is a large modell of the town, built by the pupils of the local school. The "
        "director said that she was proud of there work.",
        "Correct the spelling in this text. Return only the corrected text.\n\nDear Mr. Ellis, thank you for your leter "
        "of last week. We are sorry to hear that the chairs you orderd have arrived with scratches on the legs. We "
        "will send you four new chairs on Monday, and our driver will take the old ones back. You do not have to pay "
        "anything for this. If you have any further qestions, please call our office between nine and five. With kind "
        "regards, the customer servise team.",
    ],
}
