"""Floor 2: placing the kernels on a mesh of devices."""

if __name__ == "hybrid":
    # Python started in the clone's root finds this folder under its bare name, which belongs to others (Hugging Face
    # publishes a package called `kernels`, and transformers probes for it by importing it). Under that name this is
    # an empty shell: importable, of version 0, and with nothing in it. The code lives at fusemesh.hybrid.
    __version__ = "0"
    __path__ = []

    def __getattr__(name: str) -> object:
        raise AttributeError(
            f"'hybrid' is the source folder of fusemesh.hybrid; import fusemesh.hybrid instead (wanted: {name})"
        )
