"""Check the shapes in the signatures of the package while its tests run."""

from jaxtyping import install_import_hook

install_import_hook("tokenweight", "beartype.beartype").install()
