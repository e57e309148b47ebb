"""What follows from the guesses in predictions.npz: of each validation image the class, a guess, how sure it was."""
import numpy as np

BINS = 15


def right(told, who):
    return told[who][0].astype(int) == told['target']


def per_class(told, who='student'):
    """Percent right of each class."""
    n = np.bincount(told['target'])
    return 100 * np.bincount(told['target'], right(told, who), len(n)) / np.maximum(n, 1)


def calibration(told, who='student'):
    """[BINS, 3]: of each bin of confidence the number of images, and the sums of confidence and of right guesses."""
    sure = told[who][1].astype(float)
    bins = np.clip(np.ceil(sure * BINS).astype(int) - 1, 0, BINS - 1)
    return np.stack([np.bincount(bins, weights, BINS) for weights in (None, sure, right(told, who))], 1)


def ece(counts):
    """Expected calibration error: the mean distance of confidence and accuracy."""
    return np.abs(counts[:, 1] - counts[:, 2]).sum() / max(counts[:, 0].sum(), 1)


def confusions(told, who, known):
    """{(class, guess): how often} among the images that `known` marks and that are guessed wrong."""
    chosen = known & ~right(told, who)
    pairs, counts = np.unique(np.stack([told['target'], told[who][0].astype(int)])[:, chosen], axis=1,
                              return_counts=True)
    return dict(zip(map(tuple, pairs.T.tolist()), counts.tolist()))
