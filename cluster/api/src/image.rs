//! Images and kernels.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::health::HealthSpec;

/// An image: a root file system by digest, and what to run from it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageView {
    /// Name.
    pub name: String,
    /// `sha256:…` of the file system image.
    pub digest: String,
    /// Size of the file system image in bytes.
    pub size_bytes: u64,
    /// File system: `erofs`.
    pub fs: String,
    /// When it was imported, in milliseconds of Unix time.
    pub created_at_ms: u64,
    /// What to run.
    pub config: ImageConfig,
}

/// What an image says about running it (OCI image-spec, config.md).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageConfig {
    /// Program and first arguments.
    #[serde(default)]
    pub entrypoint: Vec<String>,
    /// Further arguments, or the program when there is no entry point.
    #[serde(default)]
    pub command: Vec<String>,
    /// Environment.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// Working directory; empty means `/`.
    #[serde(default)]
    pub cwd: String,
    /// `user[:group]`; empty means root.
    #[serde(default)]
    pub user: String,
    /// Labels.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// How it is found out whether the program does its work.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub health: Option<HealthSpec>,
}

/// A guest kernel with its modules and our initramfs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelView {
    /// Name; `default` is used by VMs that name none.
    pub name: String,
    /// Release, as `uname -r` prints it in the guest.
    pub release: String,
    /// `sha256:…` of the kernel.
    pub digest: String,
    /// `sha256:…` of the initramfs.
    pub initramfs_digest: String,
    /// Size of kernel and initramfs in bytes.
    pub size_bytes: u64,
    /// Modules in the initramfs.
    pub modules: Vec<String>,
    /// When it was imported, in milliseconds of Unix time.
    pub created_at_ms: u64,
}
