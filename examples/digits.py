"""Learn to read handwritten digits with softmax regression.

The model is one linear layer, ``logits = pixels @ weights + bias``. Its loss is the cross-entropy, the mean of
``-log_softmax(logits)`` at the true classes, and the gradient of that loss with respect to the logits is
``softmax(logits) - one_hot(classes)``: the two functions are all that training needs. Gradient descent with momentum on
1,257 of scikit-learn's bundled 8 x 8 images reads 96.7 % of the other 540 correctly.

Run it with ``python examples/digits.py``; it takes about two seconds.
"""

import numpy as np
from sklearn.datasets import load_digits

from fastsoftmax import log_softmax, softmax

N_HELD_OUT = 540
N_STEPS = 400
LEARNING_RATE = 0.5
MOMENTUM = 0.9
SHADES = " .:-=+*#%@"


def train(pixels, classes, n_classes=10):
    """Return the weights and the bias of a softmax regression."""
    weights = np.zeros((pixels.shape[1], n_classes), np.float32)
    bias = np.zeros(n_classes, np.float32)
    velocity = np.zeros_like(weights), np.zeros_like(bias)
    one_hot = np.eye(n_classes, dtype=np.float32)[classes]
    for step in range(N_STEPS):
        logits = pixels @ weights + bias
        if step % 100 == 0:
            print(f"step {step:4d}   cross-entropy {cross_entropy(logits, classes):.4f}")
        gradient = (softmax(logits, axis=1) - one_hot) / len(classes)
        for parameter, speed, slope in zip(
            (weights, bias), velocity, (pixels.T @ gradient, gradient.sum(0)), strict=True
        ):
            speed *= MOMENTUM
            speed -= LEARNING_RATE * slope
            parameter += speed
    print(f"step {N_STEPS:4d}   cross-entropy {cross_entropy(pixels @ weights + bias, classes):.4f}")
    return weights, bias


def cross_entropy(logits, classes):
    """Return the mean negative log-probability of the true classes."""
    return -log_softmax(logits, axis=1)[np.arange(len(classes)), classes].mean()


def draw(image, probabilities):
    """Print an 8 x 8 image with values in [0, 1] beside a bar for the probability of each class."""
    rows = ["".join(SHADES[round(float(value) * (len(SHADES) - 1))] * 2 for value in row) for row in image]
    rows = ["", *rows, ""]  # ten lines, one for each class
    for digit, (row, probability) in enumerate(zip(rows, probabilities, strict=True)):
        print(f"  {row:16s}   {digit}  {probability:6.4f}  {'#' * round(30 * float(probability))}".rstrip())


def main():
    """Train, report on the held-out digits, and return the accuracy there."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    pixels = (digits.data[order] / 16).astype(np.float32)
    classes = digits.target[order]

    weights, bias = train(pixels[N_HELD_OUT:], classes[N_HELD_OUT:])

    probabilities = softmax(pixels[:N_HELD_OUT] @ weights + bias, axis=1)
    guesses = probabilities.argmax(axis=1)
    accuracy = float((guesses == classes[:N_HELD_OUT]).mean())
    print(f"\n{accuracy:.1%} of {N_HELD_OUT} held-out digits are read correctly.")

    wrong = np.flatnonzero(guesses != classes[:N_HELD_OUT])[:1]
    for index in [0, 2, *wrong]:
        print(f"\na {classes[index]}, read as {guesses[index]}:")
        draw(pixels[index].reshape(8, 8), probabilities[index])
    return accuracy


if __name__ == "__main__":
    main()
