"""``planner serve``: the search in a browser (extra ``serve``).

    fields    text of a form, an address or JSON -> what was asked        refused with 400, 413 or 422
    answers   asked -> planner.plans/1 -> page, review                    in worker processes
    workers   a few processes, each answer within a time and a memory     503, 504
    app       addresses, limits, headers, pages                           Starlette
    server    connections                                                 uvicorn

An answer depends on its request alone; the last ones stay in memory, up to a number of bytes. Nothing of the
machine is read but the package's own files, nothing is written, and nothing is asked of a network.
"""
