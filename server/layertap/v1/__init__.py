"""Code that protoc made from ``proto/layertap/v1``: import the modules, there is nothing here.

Never edited by hand: change the .proto and run ``make gen``.
"""
