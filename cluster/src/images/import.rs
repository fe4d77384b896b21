//! From uploads, or from the host's own files, to content in the store. All of it blocks.

use std::collections::BTreeMap;
use std::error::Error;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use blixard_agent_api::{BlobRef, Digest};
use blixard_api::UPLOAD_BYTES_MAX;
use blixard_api::health::HealthSpec;
use blixard_api::image::ImageConfig;
use blixard_images::{ImageSource, Limits};
use blixard_vmm_api::health::{RETRIES_MAX, TIME_MS_MAX, TIME_MS_MIN};
use tempfile::NamedTempFile;
use tokio::sync::{RwLock, RwLockReadGuard};

use super::blobs::{BlobError, BlobStore};
use crate::clock;
use crate::state::ImageRecord;

/// Free space that imports leave alone, in bytes: the log and the state need some.
pub const FREE_BYTES_MIN: u64 = 256 << 20;

/// Why nothing was imported.
#[derive(Debug, thiserror::Error)]
pub enum ImportFailure {
    /// There is no room.
    #[error("there is not enough space for images: {free} bytes are free, {wanted} are needed")]
    NoSpace {
        /// Free bytes.
        free: u64,
        /// Needed bytes, as far as known.
        wanted: u64,
    },
    /// The upload is no image.
    #[error("this is no image that can be imported")]
    Image(#[source] blixard_images::ImportError),
    /// The upload is no kernel bundle.
    #[error("this is no kernel that can be imported")]
    Kernel(#[source] Box<blixard_images::kernel::BundleError>),
    /// The host's own kernel cannot be taken.
    #[error("the kernel of this host cannot be taken")]
    HostKernel(#[source] Box<blixard_images::kernel::CollectError>),
    /// The modules make no initramfs.
    #[error("these modules make no initramfs")]
    Initramfs(#[source] blixard_images::InitramfsError),
    /// The init program of guests cannot be read.
    #[error("cannot read {path}, the init program of guests (see --init)")]
    Init {
        /// Where it should be.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// The content cannot be kept.
    #[error("the import cannot be kept")]
    Keep(#[source] BlobError),
    /// A temporary file cannot be made.
    #[error("cannot make a temporary file")]
    Temporary(#[source] io::Error),
}

impl ImportFailure {
    /// What to try.
    pub fn suggestion(&self) -> Option<String> {
        match self {
            Self::Image(_) => Some(
                "give a root file system as tar, an OCI layout as tar, or what docker save writes".into(),
            ),
            Self::Kernel(_) | Self::Initramfs(_) => {
                Some("make the upload with: blixard kernel import".into())
            }
            Self::HostKernel(_) => Some("sudo blixard kernel import".into()),
            Self::Init { .. } => Some("install blixard-init beside blixard-node".into()),
            Self::NoSpace { .. } | Self::Keep(_) | Self::Temporary(_) => None,
        }
    }

    /// True when some cause is a full disk.
    pub fn is_full_disk(&self) -> bool {
        matches!(self, Self::NoSpace { .. }) || has_kind(self, io::ErrorKind::StorageFull)
    }

    /// True when some cause is an upload that did not arrive in time.
    pub fn is_timeout(&self) -> bool {
        has_kind(self, io::ErrorKind::TimedOut)
    }

    /// True when the fault is this node's, not the upload's.
    pub fn is_ours(&self) -> bool {
        matches!(self, Self::Keep(_) | Self::Temporary(_) | Self::Init { .. })
    }
}

fn has_kind(error: &ImportFailure, kind: io::ErrorKind) -> bool {
    let mut at: Option<&dyn Error> = Some(error);
    while let Some(error) = at {
        if error.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == kind) {
            return true;
        }
        at = error.source();
    }
    false
}

/// Imports into one store. Clones are the same importer.
#[derive(Debug, Clone)]
pub struct Importer {
    blobs: BlobStore,
    /// Program that becomes PID 1 of guests.
    init: Arc<PathBuf>,
    /// Held for reading from before content is kept until a record names it, for writing by a sweep.
    in_use: Arc<RwLock<()>>,
}

impl Importer {
    /// An importer into this store; kernels are given `init` as PID 1.
    pub fn new(blobs: BlobStore, init: PathBuf) -> Self {
        Self { blobs, init: Arc::new(init), in_use: Arc::default() }
    }

    /// The store.
    pub fn blobs(&self) -> &BlobStore {
        &self.blobs
    }

    /// The program that becomes PID 1 of guests.
    pub(super) fn init(&self) -> &Path {
        &self.init
    }

    /// Moves a finished temporary file into the store.
    pub(super) fn keep(&self, digest: Digest, file: NamedTempFile) -> Result<BlobRef, ImportFailure> {
        let blob = self.blobs.keep(digest, file.path()).map_err(ImportFailure::Keep)?;
        // The file has another name now, so there is nothing left to remove.
        file.into_temp_path().keep().ok();
        Ok(blob)
    }

    /// Keeps unnamed content safe from sweeps while it is held.
    pub async fn importing(&self) -> RwLockReadGuard<'_, ()> {
        self.in_use.read().await
    }

    /// Removes content that `needed` does not name. Blocks while something is being imported.
    pub async fn sweep(&self, needed: impl Fn(Digest) -> bool + Send + 'static) {
        let _alone = self.in_use.write().await;
        let blobs = self.blobs.clone();
        let swept = tokio::task::spawn_blocking(move || blobs.sweep(needed)).await;
        match swept {
            Ok(Ok(0)) => {}
            Ok(Ok(count)) => tracing::info!(count, "content that nothing needs any more was removed"),
            Ok(Err(error)) => tracing::warn!("cannot remove content: {}", crate::host::chain(&error)),
            Err(error) => tracing::warn!("cannot remove content: {error}"),
        }
    }

    /// Refuses what cannot fit, before it is read.
    ///
    /// # Errors
    /// [`ImportFailure::NoSpace`].
    pub fn check_space(&self, wanted: u64) -> Result<(), ImportFailure> {
        let Some(free) = self.blobs.free_bytes() else { return Ok(()) };
        let free = free.saturating_sub(FREE_BYTES_MIN);
        if free == 0 || free < wanted { Err(ImportFailure::NoSpace { free, wanted }) } else { Ok(()) }
    }

    /// Reads an image and keeps its file system.
    ///
    /// # Errors
    /// See [`ImportFailure`]. Nothing is left behind.
    pub fn image(&self, name: String, source: &mut dyn Read) -> Result<ImageRecord, ImportFailure> {
        let temporary = NamedTempFile::new_in(self.blobs.spool()).map_err(ImportFailure::Temporary)?;
        let mut out: File = temporary.reopen().map_err(ImportFailure::Temporary)?;
        let limits = Limits { source_bytes: UPLOAD_BYTES_MAX, ..Limits::default() };
        let source = ImageSource { stream: source, spool: self.blobs.spool() };
        let made = blixard_images::import_rootfs(source, &limits, &mut out, &mut |_| ())
            .map_err(ImportFailure::Image)?;
        let digest = Digest::from_bytes(made.sha256);
        let blob = self.keep(digest, temporary)?;
        Ok(ImageRecord {
            name,
            blob,
            fs: "erofs".into(),
            created_at_ms: clock::now_ms(),
            config: config(made.config),
        })
    }
}

fn config(found: blixard_images::ImageConfig) -> ImageConfig {
    let env = found.env.iter().map(|entry| entry.split_once('=').unwrap_or((entry, "")));
    let env: BTreeMap<String, String> =
        env.filter(|(name, _)| !name.is_empty()).map(|(n, v)| (n.to_owned(), v.to_owned())).collect();
    ImageConfig {
        entrypoint: found.entrypoint,
        command: found.cmd,
        env,
        cwd: found.cwd,
        user: found.user,
        labels: found.labels,
        health: found.health.map(health),
    }
}

/// Times out of range are the nearest possible ones: nobody could change them in an image.
fn health(found: blixard_images::Healthcheck) -> HealthSpec {
    let ms = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
    let clamped = |time: Duration| ms(time).clamp(TIME_MS_MIN, TIME_MS_MAX);
    HealthSpec {
        command: Some(found.command),
        interval_ms: found.interval.map(clamped),
        timeout_ms: found.timeout.map(clamped),
        retries: found.retries.map(|retries| retries.clamp(1, RETRIES_MAX)),
        start_period_ms: found.start_period.map(|time| ms(time).min(TIME_MS_MAX)),
    }
}
