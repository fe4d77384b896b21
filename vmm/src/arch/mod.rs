//! What depends on the processor architecture. Each architecture provides the modules of [`x86_64`].

pub mod x86_64;
