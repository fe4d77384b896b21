//! Guest kernels: what `blixard kernel import` collects on a host and sends, and what a node makes of it.
//!
//! A *kernel bundle* is a tar stream: `kernel` (bzImage or ELF vmlinux), `release` (the version that `uname -r` will
//! show), and `modules/NNN-name.ko` with `.gz`, `.xz` or `.zst` behind it or not, where the numbers are the load order.
//!
//! * `bundle`: writing and reading bundles
//! * `collect`: choosing the modules that a guest needs
//! * `image`, `elf`: what a kernel and a module must look like
//! * `payload`: the ELF kernel inside a bzImage

mod bundle;
mod collect;
pub(crate) mod elf;
pub(crate) mod image;
mod payload;

pub use bundle::{
    BundleError, BundleFile, KernelBundle, KernelLimits, read_kernel_bundle, write_kernel_bundle,
};
pub use collect::{CollectError, collect_kernel};
pub use elf::ModuleError;
pub use image::{KernelImage, NotAKernel};
