"""Retrieval by the book: a list of scores for each query."""

import statistics


def rank(scores, right):
    """Count the wrong entries that score at least as high as the best right one."""
    best = max(score for score, is_right in zip(scores, right, strict=True) if is_right)
    return sum(score >= best for score, is_right in zip(scores, right, strict=True) if not is_right)


def retrieval(image, text, text_image_id, recall_at=(1, 5, 10), caption_id=None):
    """Image rows are in the order of their ids, from 0. With captions, those of an image are right wherever they stand."""
    image, text, owner = image.double().tolist(), text.double().tolist(), text_image_id.tolist()
    captions = range(len(text)) if caption_id is None else caption_id.tolist()
    captions_of = [[captions[t] for t in range(len(text)) if owner[t] == i] for i in range(len(image))]

    def is_right(image_id, text_id):
        return owner[text_id] == image_id or captions[text_id] in captions_of[image_id]

    def dot(a, b):
        return sum(x * y for x, y in zip(a, b, strict=True))

    i2t = [
        rank([dot(vector, other) for other in text], [is_right(image_id, text_id) for text_id in range(len(text))])
        for image_id, vector in enumerate(image)
    ]
    t2i = [
        rank([dot(vector, other) for other in image], [is_right(image_id, text_id) for image_id in range(len(image))])
        for text_id, vector in enumerate(text)
    ]
    result = {
        f"{way}_r{k}": 100 * sum(r < k for r in ranks) / len(ranks)
        for way, ranks in (("i2t", i2t), ("t2i", t2i))
        for k in recall_at
    }
    result["rsum"] = sum(result.values())
    for way, ranks in (("i2t", i2t), ("t2i", t2i)):
        result[f"{way}_median_rank"] = 1 + statistics.median(ranks)
        result[f"{way}_mean_rank"] = 1 + sum(ranks) / len(ranks)
    return result
