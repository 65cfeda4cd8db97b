"""ChatGLM-6B's tokenizer: sentencepiece pieces of `ice_text.model`, some of which stand for line ends, tabs and runs of blanks."""

from __future__ import annotations

import re
from typing import Any

from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

_MOST_BLANKS = 80
_BLANKS = re.compile(rf" {{2,{_MOST_BLANKS}}}")
_BLANK_PIECE = re.compile(r"<\|blank_(\d+)\|>")


class ChatGLMTokenizer(SentencePieceBackend):
    """Encode text for ChatGLM-6B; [gMASK] and <sop>, which ask for an answer, follow each text.

    `num_image_tokens` is how many ids stand before the pieces: none today, 20,000 in the first release.
    """

    vocab_files_names = {"vocab_file": "ice_text.model"}
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
