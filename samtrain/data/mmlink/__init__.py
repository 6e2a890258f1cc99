"""MmLINK: pairs (or more) of pictures that share a thing, built from any pictures of things in several poses.

options (the configuration) -> sources (pictures by reference) -> plan (who appears where) -> jobs (keys of results) ->
runner (find, do, count; `ray_data` or this process) -> stages (segment, compose, fill, write, ...) -> store (results by
key) -> filters -> output (shards, report, attribution, contact sheet). `build` puts them together.
"""
