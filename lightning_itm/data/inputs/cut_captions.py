"""Captions that are longer than the context length, of which a tokenizer drops the end without a word."""

import warnings
from collections.abc import Mapping
from typing import Any

from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from torch import Tensor

from lightning_itm.unreadable import PairMarks


class CutCaptions(PairMarks):
    """Count the captions that are cut, each once, and warn at the first.

    Args:
        num_texts: Number of texts of the set.
    """

    def look(self, tokenizer: Any, text: str, tokens: Any, text_id: int) -> None:
        """Count a caption if it is cut.

        Args:
            tokenizer: What encoded the caption. Of others than :func:`is_cut` names it is not known.
            text: The caption.
            tokens: The token ids that the tokenizer returned, `(context_length,)`, or a dict with ``input_ids``.
            text_id: The number of the caption.
        """
        if not is_cut(tokenizer, text, tokens) or not self.add(text_id) or not self.is_first():
            return
        warnings.warn(
            f"Text {text_id} is longer than {len(_ids(tokens))} tokens, the context length, and its end is cut off: "
            f"{text[:80]!r}. Further ones are counted in `ImageTextDataset.num_cut` and not reported. Shorten them, or split "
            "them into several captions.",
            stacklevel=6,  # past `load_text`, the loading and `__getitem__`: where the pair was asked for
        )


def is_cut(tokenizer: Any, text: str, tokens: Any) -> bool:
    """Return whether a tokenizer dropped the end of a text. False where that is not known.

    It is known of open_clip's tokenizers, and of those with a method ``is_cut(text, token_ids)`` of their own, such as the
    one of :class:`~lightning_itm.HFDualEncoder`.

    Args:
        tokenizer: What encoded the text.
        text: The whole text.
        tokens: The token ids that the tokenizer returned, `(context_length,)`, or a dict with ``input_ids``.

    Example:
        >>> import open_clip
        >>> from lightning_itm.data.inputs.cut_captions import is_cut
        >>> tokenizer = open_clip.SimpleTokenizer(context_length=5)
        >>> [is_cut(tokenizer, text, tokenizer([text])[0]) for text in ("a red dog", "a big red dog")]
        [False, True]
    """
    tokens = _ids(tokens)
    if not isinstance(tokens, Tensor) or tokens.ndim != 1 or len(tokens) == 0:
        return False
    if hasattr(tokenizer, "is_cut"):
        return bool(tokenizer.is_cut(text, tokens))
    if isinstance(tokenizer, SimpleTokenizer):
        # Padding at the end says that all fits. So few texts are encoded a second time. `reduction_fn` leaves words out on
        # purpose.
        is_full = tokenizer.reduction_fn is None and int(tokens[-1]) != 0
        return is_full and len(tokenizer.encode(text)) + 2 > len(tokens)  # and the tokens of start and end
    if isinstance(tokenizer, HFTokenizer) and not tokenizer.tokenizer_mode:
        inner = tokenizer.tokenizer
        # Where the last token becomes 0, it can't be told from padding.
        if not tokenizer.strip_sep_token and inner.pad_token_id in (int(tokens[0]), int(tokens[-1])):
            return False
        return len(inner(tokenizer.clean_fn(text)).input_ids) > len(tokens)
    return False


def _ids(tokens: Any) -> Any:
    return tokens.get("input_ids") if isinstance(tokens, Mapping) else tokens
