"""The only door to what Ray does not document: `table` lists and checks it, `core` and `train` give it names of ours.

`train` imports Ray Train, which takes seconds: import it late. docs/private-api.md says what an upgrade may break.
"""
