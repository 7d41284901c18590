"""The formulas, one pair at a time, for tests to compare with."""

import math


def direction(similarity, ids, other_ids, positive, anchor_cost):
    """Apply `anchor_cost(positive, negatives)` to every row of nested lists. An id is that of an image, and a caption."""
    costs = []
    for i, row in enumerate(similarity):
        negatives = [
            score for j, score in enumerate(row) if all(a != b for a, b in zip(ids[i], other_ids[j], strict=True))
        ]
        costs.append(anchor_cost(positive[i], negatives))
    return costs


def hardest(positive, negatives, margin):
    return max([max(0.0, margin - positive + negative) for negative in negatives], default=0.0)


def mean(positive, negatives, margin):
    return sum(max(0.0, margin - positive + negative) for negative in negatives) / max(1, len(negatives))


def selective(positive, negatives, margin, epsilon):
    if negatives and abs(positive - max(negatives)) < epsilon:
        return mean(positive, negatives, margin)
    return hardest(positive, negatives, margin)


def info_nce(positive, negatives, scale, hardness=0.0, relative_margin=None):
    right = math.exp(scale * positive)
    wrong = [math.exp((scale + hardness) * score) for score in kept(positive, negatives, relative_margin)]
    return -math.log(right / sum([right, *wrong]))


def sigmoid(positive, negatives, scale, bias, hardness=0.0, relative_margin=None):
    def log_sigmoid(x):
        return -math.log1p(math.exp(-x))

    negatives = kept(positive, negatives, relative_margin)
    wrong = sum(log_sigmoid(-(scale + hardness) * score - bias) for score in negatives)
    return -log_sigmoid(scale * positive + bias) - wrong


def kept(positive, negatives, relative_margin):
    if relative_margin is None:
        return negatives
    return [score for score in negatives if score <= positive - relative_margin * abs(positive)]


def loss(image, text, image_id, anchor_cost, caption_id=None):
    """The mean over the anchors and the two directions. By default, every caption is another one."""
    captions = [f"of pair {i}" for i in range(len(image_id))] if caption_id is None else caption_id.tolist()
    ids = list(zip(image_id.tolist(), captions, strict=True))
    similarity = (image @ text.T).tolist()
    transposed = [list(column) for column in zip(*similarity, strict=True)]
    positive = [similarity[i][i] for i in range(len(ids))]
    i2t = direction(similarity, ids, ids, positive, anchor_cost)
    t2i = direction(transposed, ids, ids, positive, anchor_cost)
    return (sum(i2t) + sum(t2i)) / (2 * len(ids))
