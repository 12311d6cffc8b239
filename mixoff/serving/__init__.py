"""A server with OpenAI's endpoints in front of one model: requests become rows, and a batcher computes them together.

A request passes `app` (HTTP), `fields` (what may be asked), `worker` (the only thread that runs the model), a batcher
(`rows` or `paged`) and comes back as `replies`. Needs the extra `serve`.
"""
