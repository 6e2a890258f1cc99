"""Before anything is read: is what the last stage needs there too? An hour of segmentation is no time to find out."""

import os

from samtrain.core.errors import ConfigError
from samtrain.data.mmlink.optional import import_cv2, import_optional
from samtrain.data.mmlink.options import BuildConfig, ChatWriterOptions, U2netOptions


def check_stages(config: BuildConfig) -> None:
    """Libraries, packaged models and keys; hub models are found out about when their stage loads them.

    Raises:
        ConfigError: naming what is missing and how to get it.
    """
    import_cv2()
    import_optional("imagehash", needed_for="building MmLINK")
    segment, writer = config.segment.options, config.writer.options
    if isinstance(segment, U2netOptions):
        from samtrain.data.mmlink.segment.u2net import model_path

        import_optional("onnxruntime", needed_for="segment.kind = u2net")
        model_path(segment.model)
    if "patchmatch" in (config.fill.kind, config.build.plates.inpaint if config.build.plates.remove else ""):
        from samtrain.data.mmlink.fill.inpaint import Inpainter

        Inpainter("patchmatch")
    if config.fill.kind == "diffusers":
        import_optional("diffusers", needed_for="fill.kind = diffusers")
    if isinstance(writer, ChatWriterOptions):
        import_optional("httpx2", needed_for="writer.kind = openai")
        if not os.environ.get(writer.api_key_env):
            raise ConfigError(
                f"writer.api_key_env = {writer.api_key_env!r}: this environment variable is not set; it holds the key "
                "(any text for a server that asks for none)"
            )
