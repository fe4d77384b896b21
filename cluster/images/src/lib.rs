//! Root file systems and guest kernels from foreign formats. It runs in a process without privileges, and all of its
//! input is hostile: everything is bounded, nothing is unpacked anywhere, and errors name the entry at fault.
//!
//! * [`import_rootfs`]: a tar, an OCI layout or a docker archive becomes an EROFS image.
//!   `decompress` → `spool` → `tar` → `layer` → `tree` → `erofs`; `oci` chooses the layers.
//! * [`build_initramfs`]: what a guest starts from.
//! * [`kernel`]: guest kernels with their modules.
#![forbid(unsafe_code)]

mod config;
mod decompress;
mod erofs;
mod import;
mod initramfs;
pub mod kernel;
mod layer;
mod limits;
mod oci;
mod spool;
mod tar;
#[cfg(test)]
mod tests;
mod tree;

pub use config::{Healthcheck, ImageConfig};
pub use erofs::ErofsError;
pub use import::{ImageSource, ImportError, ImportedImage, import_rootfs};
pub use initramfs::{InitramfsError, MODULES_MAX, build_initramfs};
pub use layer::LayerError;
pub use limits::{LimitReached, Limits};
pub use oci::{OciError, hex};
pub use spool::SpoolError;
pub use tar::TarError;
pub use tree::TreeError;
