"""Build time: trained supernets in, bundles out."""
