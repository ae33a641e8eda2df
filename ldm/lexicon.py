"""A frozen text encoder's tokens and embeddings, and the words that it is taught."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from ldm.config import UserError

_TABLES = ("word_embeddings", "token_embedding", "shared", "embed_tokens")  # as encoders call their embeddings


def pattern(words: Sequence[str]) -> re.Pattern[str]:
    """Where any of the words stands by itself, in capitals or not; a group for each, of which the first wins."""
    return re.compile(rf"(?<!\w)(?:{'|'.join(f'({re.escape(word)})' for word in words)})(?!\w)", re.IGNORECASE)


class Vocabulary(nn.Module):
    """Embeddings of a frozen encoder, and after them the rows (n, D) of the words learned."""

    def __init__(self, known: nn.Embedding) -> None:
        super().__init__()
        self.known = known
        self.rows: Tensor = known.weight[:0]  # no parameter: whoever trains them holds them

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids (B, L) -> (B, L, D)."""
        size = self.known.num_embeddings
        new = ids >= size
        found: Tensor = self.known(ids.masked_fill(new, 0))
        if len(self.rows) == 0:
            return found
        # as an embedding, whose gradient is summed in one order, which indexing's is not
        return torch.where(new[..., None], embedding((ids - size).clamp(min=0), self.rows.to(found)), found)


class Lexicon:
    """Tokenizes captions for a frozen network; a word learned has ids of its own, beyond the vocabulary, and stands in
    the network's table of embeddings from its first use on.

    tokenize: captions -> ids with the special tokens, of any length.
    """

    def __init__(self, network: nn.Module, tokenize: Callable[[list[str]], list[list[int]]]) -> None:
        self._network, self._known = network, tokenize
        self._words: dict[str, Tensor] = {}

    def __call__(self, captions: list[str]) -> list[list[int]]:
        """Ids with the special tokens, of any length."""
        if not self._words:
            return self._known(captions)
        ids, first = dict[str, list[int]](), self.vocabulary.known.num_embeddings
        for word, rows in self._words.items():
            ids[word] = list(range(first, first + len(rows)))
            first += len(rows)
        words = sorted(ids, key=len, reverse=True)  # of words that begin alike the longest
        (head, tail), where = self._specials(), pattern(words)
        found = []
        for caption in captions:
            own, place = list(head), 0
            for match in where.finditer(caption):
                own += [*self.plain(caption[place : match.start()]), *ids[words[(match.lastindex or 1) - 1]]]
                place = match.end()
            found.append([*own, *self.plain(caption[place:]), *tail])
        return found

    def plain(self, caption: str) -> list[int]:
        """Ids of a caption's known words without the special tokens."""
        head, tail = self._specials()
        return self._known([caption.strip()])[0][len(head) : -len(tail)] if caption.strip() else []

    def learn(self, word: str, rows: Tensor) -> None:
        """Tell `word`, wherever it stands by itself, in capitals or not, as the embeddings `rows` (n, D).

        Raises UserError for rows of another width, and an empty word.
        """
        word, width = word.strip(), self.vocabulary.known.embedding_dim
        if not word:
            raise UserError("a word to learn must not be empty")
        if rows.shape[1] != width:
            raise UserError(f"{word!a}: its embeddings have width {rows.shape[1]}, and this text encoder's {width}")
        self._words[word.lower()] = rows
        self.vocabulary.rows = torch.cat(list(self._words.values()))

    def beginnings(self, caption: str, count: int) -> Tensor:
        """Embeddings (count, D) of a caption's known words, as often as is needed. Raises UserError for none."""
        ids = self.plain(caption)
        if not ids:
            raise UserError(f"{caption!a} has no word to begin with")
        return self.vocabulary.known.weight[[ids[k % len(ids)] for k in range(count)]].detach().clone()

    @property
    def vocabulary(self) -> Vocabulary:
        """The network's table, where words can be added."""
        places = [(owner, name, part) for owner in self._network.modules() for name, part in owner.named_children()
                  if isinstance(part, (nn.Embedding, Vocabulary)) and name in _TABLES]  # fmt: skip
        found = places[0][2]
        if isinstance(found, Vocabulary):
            return found
        assert isinstance(found, nn.Embedding)
        made = Vocabulary(found)
        for owner, name, _ in places:  # T5 has its table in two places
            setattr(owner, name, made)
        return made

    def _specials(self) -> tuple[list[int], list[int]]:
        """The tokens before and after every caption's own."""
        empty = self._known([""])[0]
        return empty[: len(empty) // 2], empty[len(empty) // 2 :]
