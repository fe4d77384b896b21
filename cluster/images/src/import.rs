//! From a stream of bytes to a root file system image.

use std::fs::File;
use std::io::{self, BufWriter, Read};
use std::path::Path;

use crate::config::ImageConfig;
use crate::decompress::Decoder;
use crate::erofs::{self, ErofsError};
use crate::layer::{LayerError, apply_archive};
use crate::limits::{Budget, Limits};
use crate::oci::{self, OciError};
use crate::spool::{Spool, SpoolError};
use crate::tree::Tree;

/// Where an image comes from: one stream, whose kind is seen from what is in it. A plain root file system as tar, an
/// OCI layout as tar of its directory, or what `docker save` writes; each as it is or compressed by gzip, zstd or xz.
pub struct ImageSource<'a> {
    /// The bytes.
    pub stream: &'a mut dyn Read,
    /// A directory for temporary files without names; they need the space of the expanded archive.
    pub spool: &'a Path,
}

/// A finished image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImportedImage {
    /// SHA-256 of the image file.
    pub sha256: [u8; 32],
    /// Its length in bytes, a multiple of 4096.
    pub bytes: u64,
    /// What the image says about how to run it.
    pub config: ImageConfig,
    /// Number of files, directories and so on in it.
    pub files: u64,
}

/// Why an import failed. The messages name the entry or the file that is at fault.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// The source cannot be read, is too large, or cannot be spooled.
    #[error(transparent)]
    Spool(#[from] SpoolError),
    /// The archive is refused.
    #[error(transparent)]
    Archive(#[from] LayerError),
    /// The image in the archive is refused.
    #[error(transparent)]
    Image(#[from] OciError),
    /// The image cannot be written.
    #[error(transparent)]
    Write(#[from] ErofsError),
}

/// Reads an image from `source` and writes it as EROFS to `out`, an empty file, from its present position on.
/// `progress` is called with the number of bytes of the source that were read so far.
///
/// # Errors
/// See [`ImportError`]. `out` may hold a part of an image then.
pub fn import_rootfs(
    source: ImageSource<'_>,
    limits: &Limits,
    out: &mut File,
    progress: &mut dyn FnMut(u64),
) -> Result<ImportedImage, ImportError> {
    let mut spool = Spool::new(source.spool, limits.expanded_bytes);
    let mut metered = Metered {
        stream: source.stream,
        budget: Budget::new("bytes in the source", limits.source_bytes),
        read: 0,
        progress,
    };
    let mut decoder = Decoder::new(&mut metered).map_err(SpoolError::Source)?;
    let (archive, _) = spool.take(&mut decoder)?;
    drop(decoder);

    let mut tree = Tree::new(limits);
    apply_archive(&mut tree, &spool, archive)?;
    let mut config = ImageConfig::default();
    if let Some(layout) = oci::detect(&mut tree, &spool)? {
        (tree, config) = oci::read(layout, &mut tree, &mut spool, limits)?;
    }
    let mut out = BufWriter::with_capacity(1 << 20, out);
    let written = erofs::write(&tree, &spool, limits.image_bytes, &mut out)?;
    Ok(ImportedImage { sha256: written.sha256, bytes: written.bytes, config, files: written.inodes })
}

/// Counts what is read.
struct Metered<'a> {
    stream: &'a mut dyn Read,
    budget: Budget,
    read: u64,
    progress: &'a mut dyn FnMut(u64),
}

impl Read for Metered<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.stream.read(buffer)?;
        let bytes = u64::try_from(count).unwrap_or(u64::MAX);
        self.budget.take(bytes).map_err(io::Error::other)?;
        self.read += bytes;
        (self.progress)(self.read);
        Ok(count)
    }
}
