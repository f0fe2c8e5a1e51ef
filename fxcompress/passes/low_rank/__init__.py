"""Parts of the passes that put thin layers in the place of a thick one.

``metric`` is what an error is measured in, ``truncate`` the best matrix of a rank in it, ``ranks`` how many, ``sites``
where it is legal, ``splice`` the change of the graph, ``account`` what the report says.
"""
