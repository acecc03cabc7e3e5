"""Prompts that the bundled pair was not trained on."""

QUESTIONS = (
    "Why do birds sing in the morning?",
    "What do bees make?",
    "Tell me a short story about a ladder.",
    "Do lions live in caves?",
    "How do we make bread?",
    "Where does the train go at night?",
    "Can you tell me a story with the words feather, seek and fast?",
    "Is the moon made of cheese?",
    "What is a toy car?",
    "Why is the snow cold?",
    "Who lives in the old castle?",
    "When do frogs sleep?",
    "What color is the sky?",
    "Please write a story about a teacher.",
    "How many legs does a spider have?",
    "Do fish drink water?",
)
