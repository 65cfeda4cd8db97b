"""ChatGLM's tokenizers, both over sentencepiece and both called ChatGLMTokenizer in the published files.

That of ChatGLM-6B has pieces (`ice_text.model`) that stand for line ends, tabs and runs of blanks, and ends a prompt with what asks
for an answer. That of ChatGLM2-6B and ChatGLM3-6B (`tokenizer.model`) has plain pieces, and begins a text with it.
"""

from __future__ import annotations

import re
from typing import Any

from transformers.tokenization_utils_sentencepiece import SentencePieceBackend
from transformers.utils.hub import cached_file

_MOST_BLANKS = 80
_BLANKS = re.compile(rf" {{2,{_MOST_BLANKS}}}")
_BLANK_PIECE = re.compile(r"<\|blank_(\d+)\|>")
_PIECES = "ice_text.model"


class ChatGLMTokenizer(SentencePieceBackend):
    """Encode text for ChatGLM-6B; [gMASK] and <sop>, which ask for an answer, follow each text.

    `num_image_tokens` is how many ids stand before the pieces: none today, 20,000 in the first release.
    """

    vocab_files_names = {"vocab_file": _PIECES}
    model_input_names = ["input_ids", "attention_mask"]
    padding_side = "left"

    def __init__(
        self,
        vocab_file: str,
        num_image_tokens: int = 0,
        gmask_token: str = "[gMASK]",
        bos_token: str = "<sop>",
        eos_token: str = "<eop>",
        mask_token: str = "[MASK]",
        pad_token: str = "<pad>",
        unk_token: str = "<unk>",
        **kwargs: Any,
    ) -> None:
        self.num_image_tokens, self.gmask_token = num_image_tokens, gmask_token
        super().__init__(
            vocab_file=vocab_file,
            num_image_tokens=num_image_tokens,
            gmask_token=gmask_token,
            bos_token=bos_token,
            eos_token=eos_token,
            mask_token=mask_token,
            pad_token=pad_token,
            unk_token=unk_token,
            **kwargs,
        )
        # The base class knows special tokens by the numbers of their pieces.
        self._added_tokens_decoder = {index + num_image_tokens: token for index, token in self._added_tokens_decoder.items()}
        self._added_tokens_encoder = {token.content: index for index, token in self._added_tokens_decoder.items()}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load as any tokenizer of transformers; what has no pieces of ChatGLM-6B is ChatGLM2's or 3's under the same name."""
        hub = {key: kwargs[key] for key in ("cache_dir", "revision", "token", "local_files_only", "subfolder") if key in kwargs}
        found = cached_file(
            pretrained_model_name_or_path,
            _PIECES,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            **hub,
        )
        if found is None:
            return ChatGLM2Tokenizer.from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @property
    def vocab_size(self) -> int:
        return self.num_image_tokens + int(self.sp_model.get_piece_size())

    def get_vocab(self) -> dict[str, int]:
        pieces = self.sp_model.get_piece_size()
        return {
            self.sp_model.IdToPiece(index): index + self.num_image_tokens for index in range(pieces)
        } | self.added_tokens_encoder

    def _tokenize(self, text: str, **_kwargs: Any) -> list[str]:
        marked = text.replace("\n", "<n>").replace("\t", "<|tab|>")
        marked = _BLANKS.sub(lambda run: f"<|blank_{len(run[0])}|>", marked)
        return list(self.sp_model.encode(marked, out_type=str))

    def _convert_token_to_id(self, token: str) -> int:
        return int(self.sp_model.piece_to_id(token)) + self.num_image_tokens

    def _convert_id_to_token(self, index: int) -> str:
        if index < self.num_image_tokens:
            return f"<image_{index}>"
        return str(self.sp_model.IdToPiece(index - self.num_image_tokens))

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Join pieces to text, with the line ends, tabs and blanks that some of them stand for."""
        text = str(self.sp_model.decode(tokens)).replace("<n>", "\n").replace("<|tab|>", "\t")
        return _BLANK_PIECE.sub(lambda piece: " " * int(piece[1]), text)

    def build_inputs_with_special_tokens(self, token_ids_0: list[int], token_ids_1: list[int] | None = None) -> list[int]:
        """Return prompt, [gMASK], <sop>; and the answer with <eop>, where there is one."""
        asked = [*token_ids_0, self.convert_tokens_to_ids(self.gmask_token), self.bos_token_id]
        return asked if token_ids_1 is None else [*asked, *token_ids_1, self.eos_token_id]


class ChatGLM2Tokenizer(SentencePieceBackend):
    """Encode text for ChatGLM2-6B and ChatGLM3-6B; [gMASK] and sop stand before each text.

    Behind the pieces come five tokens of both models, and four of ChatGLM3 that tell who speaks.
    """

    vocab_files_names = {"vocab_file": "tokenizer.model"}
    model_input_names = ["input_ids", "attention_mask"]
    padding_side = "left"

    def __init__(
        self, vocab_file: str, unk_token: str = "<unk>", pad_token: str = "<unk>", eos_token: str = "</s>", **kwargs: Any
    ) -> None:
        own = ["[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]
        kwargs["extra_special_tokens"] = own
        super().__init__(vocab_file=vocab_file, unk_token=unk_token, pad_token=pad_token, eos_token=eos_token, **kwargs)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Join pieces to text; some are single bytes of a letter."""
        return str(self.sp_model.decode(tokens))

    def build_inputs_with_special_tokens(self, token_ids_0: list[int], token_ids_1: list[int] | None = None) -> list[int]:
        """Return [gMASK], sop and the text; and the answer with </s>, where there is one."""
        start: Any = self.convert_tokens_to_ids(["[gMASK]", "sop"])
        begun = [*start, *token_ids_0]
        return begun if token_ids_1 is None else [*begun, *token_ids_1, self.eos_token_id]
