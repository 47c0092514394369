"""Text: corpora, packing, the tokenizer with its chat template, and the reasoning parser. No torch."""
