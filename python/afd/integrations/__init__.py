"""afd in other people's trainers and pipelines.

`nft` needs the core alone; `diffusers` needs the extra `afd[wan]`. Neither is imported by the rest
of the package.
"""
