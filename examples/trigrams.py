"""Text from a toy language model: the next letter is drawn by how often it follows the last two.

    python examples/trigrams.py

The model is a table of counts, whose logarithms are the logits. What it writes depends on how it is drawn: with a low
temperature or a small nucleus it repeats what is most usual, with a high temperature it babbles.
"""

import numpy as np

from fastsoftmax import sample, softmax_topk

TEXT = """
the softmax of a row is found in one pass: the running maximum and the running sum of the exponentials are all that has
to be known of what was seen so far, and the states of two parts of a row merge into the state of the whole row. a row
that is in the cache is read twice and written once, and the time it takes is that of a copy. what is largest in a row
is known at the end of the same pass, and so is what a random number picks from it.
"""
LETTERS = sorted(set(TEXT.replace("\n", " ")))


def learn(text):
    """Return the logits of each letter after each pair of letters; -inf where it was never seen."""
    codes = [LETTERS.index(letter) for letter in text.replace("\n", " ")]
    counts = np.zeros((len(LETTERS),) * 3, np.float32)
    np.add.at(counts, (codes[:-2], codes[1:-1], codes[2:]), 1)
    with np.errstate(divide="ignore"):
        return np.log(counts)


def write(logits, start, length, rng, n_texts=1, **options):
    """Return texts that go on from two letters, all drawn together: a row for each."""
    codes = np.array([[LETTERS.index(letter) for letter in start]] * n_texts)
    for _ in range(length):
        following = sample(logits[codes[:, -2], codes[:, -1]], rng=rng, **options)
        codes = np.column_stack([codes, following])
    return ["".join(LETTERS[code] for code in row) for row in codes]


def main():
    logits = learn(TEXT)
    values, indices = softmax_topk(logits[LETTERS.index("t"), LETTERS.index("h")], 2)
    print("After 'th':", ", ".join(f"{LETTERS[i]!r} {p:.0%}" for p, i in zip(values, indices, strict=True)))
    rng = np.random.default_rng(0)
    for options in ({}, {"temperature": 0.5}, {"temperature": 2.0, "top_k": 3}, {"top_p": 0.6}):
        print(options, *write(logits, "th", 60, rng, 2, **options), sep="\n    ")


if __name__ == "__main__":
    main()
