import open_clip
import pytest
import torch
from open_clip.tokenizer import HFTokenizer
from torch.utils.data import DataLoader

from lightning_itm import ImageTextDataset
from lightning_itm.data.inputs.cut_captions import is_cut
from tests.helpers.pictures import cut_outs

SHORT, FULL, LONG = "a red dog", "a big red dog", "a big red dog runs"


@pytest.fixture
def hugging_face(tmp_path):
    """A tokenizer of words, between a token of start and one of end."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *LONG.split()]
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, "[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **special).save_pretrained(tmp_path)
    return str(tmp_path)


class TestIsCut:
    """A text that fills the context is whole, one token more is not."""

    def check(self, tokenizer):
        assert [is_cut(tokenizer, text, tokenizer([text])[0]) for text in (SHORT, FULL, LONG)] == [False, False, True]

    def test_clip(self):
        self.check(open_clip.SimpleTokenizer(context_length=6))

    @pytest.mark.parametrize("strip_sep_token", [False, True])
    def test_hugging_face(self, hugging_face, strip_sep_token):
        self.check(HFTokenizer(hugging_face, context_length=6, strip_sep_token=strip_sep_token))

    def test_what_is_left_out_on_purpose_and_what_is_not_known(self):
        masks = open_clip.SimpleTokenizer(context_length=6, reduction_mask="simple")
        assert not is_cut(masks, LONG, masks([LONG])[0])
        assert not is_cut(lambda texts: torch.ones(1, 6), LONG, torch.ones(6))
        assert not is_cut(None, LONG, LONG)


@pytest.mark.filterwarnings("ignore:Text 1 is longer")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_each_is_counted_once_and_the_first_is_a_warning(num_workers):
    texts = [[SHORT, LONG], [FULL, LONG]]
    pairs = ImageTextDataset(cut_outs(2), texts, tokenizer=open_clip.SimpleTokenizer(context_length=6))
    if num_workers == 0:
        with pytest.warns(
            UserWarning, match=r"Text 1 is longer than 6 tokens, .*is cut off: 'a big red dog runs'"
        ) as told:
            list(DataLoader(pairs))
        assert len(told) == 1
    list(DataLoader(pairs, num_workers=num_workers))
    assert pairs.num_cut == 2


def test_a_run_on_captions_that_fit_says_nothing(recwarn):
    pairs = ImageTextDataset(cut_outs(2), [SHORT, FULL], tokenizer=open_clip.SimpleTokenizer(context_length=6))
    list(DataLoader(pairs))
    assert pairs.num_cut == 0
    assert not [one for one in recwarn if "cut off" in str(one.message)]
