//! Decodes images and prepares them for CLIP exactly as Pillow and the reference do.
