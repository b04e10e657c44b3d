"""Prompts: equal-length batches of tokens, with the token strings that figures show.

Every row of a `PromptBatch` has the same number of tokens and none of them is padding: a text is cut to its first
`length` tokens, and a text with fewer is left out and counted.

Why: a sink sits at an absolute position and is read from the rows of the attention pattern, so padding would move the
positions and add rows that nobody wants to average. With equal lengths the question never comes up.

Pitfall: `prepend_bos` decides what stands at position 0. "auto" does what the model's own tokenizer does when it
encodes a text, "always" (or True) puts its beginning-of-sequence token there, "never" (or False) leaves the text's own
first token. What was done is in the batch, and in every result. Behind a BOS the first token is the same in every
prompt, so a variance over prompts cannot be measured there.

Passages of one text are alike, so they are not as many independent prompts: `groups` says which belong together, and
intervals then draw groups instead of prompts.
"""

from sinklens.prompts.batch import PromptBatch, bos_text, prompts_text
from sinklens.prompts.checks import check_batch, check_ids
from sinklens.prompts.sources import Bos, from_dataset, from_file, from_texts, from_tokens, natural, random_tokens

__all__ = [
    "Bos",
    "PromptBatch",
    "bos_text",
    "check_batch",
    "check_ids",
    "from_dataset",
    "from_file",
    "from_texts",
    "from_tokens",
    "natural",
    "prompts_text",
    "random_tokens",
]
