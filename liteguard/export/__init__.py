"""From a trained adapter to a file for a phone; each step goes from a path to a path.

`merge` (adapter -> 16-bit model), `tflite` (model -> quantised TFLite), `tokenizer` (tokenizer.json
-> SentencePiece), `silence` (TFLite -> one that cannot write what a `.task` cannot show), `bundle`
(all -> `.task`), `verify` (`.task` -> opened, run and compared).
"""
