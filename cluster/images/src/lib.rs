//! Root file systems and guest kernels from foreign formats.
