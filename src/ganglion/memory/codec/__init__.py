"""Codecs: pages in fewer bytes. One codec a file, all behind `codec.Codec`."""
