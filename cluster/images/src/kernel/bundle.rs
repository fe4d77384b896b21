//! Writes and reads kernel bundles.

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::path::Path;

use super::elf::{self, ModuleError};
use super::image::{HEAD, KernelImage, NotAKernel, is_release};
use super::payload;
use crate::decompress::Decoder;
use crate::initramfs::{MODULES_MAX, is_module_name};
use crate::limits::{Budget, LimitReached};
use crate::spool::{Region, Spool, SpoolError};
use crate::tar::{Archive, EntryKind, TarError, shown};

const KERNEL: &str = "kernel";
const RELEASE: &str = "release";
const MODULES: &str = "modules/";
/// Most bytes of the file `release`.
const RELEASE_MAX: u64 = 256;

/// Bounds of one bundle.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KernelLimits {
    /// Most bytes of the bundle, as it comes and without compression.
    pub bytes: u64,
    /// Most bytes of all modules together without compression. They are kept in memory.
    pub module_bytes: u64,
}

impl Default for KernelLimits {
    /// Room for a distribution's kernel with debug symbols; the modules of a guest take a few MiB.
    fn default() -> Self {
        Self { bytes: 1 << 30, module_bytes: 256 << 20 }
    }
}

/// A file of a bundle.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BundleFile {
    /// Its path in the bundle.
    pub path: String,
    /// Its bytes.
    pub contents: Vec<u8>,
}

/// A kernel with its modules, checked.
#[derive(Debug)]
pub struct KernelBundle {
    /// Its version, as `uname -r` will show it.
    pub release: String,
    /// The kernel, at its start, in a file without a name.
    pub kernel: File,
    /// Length of the kernel in bytes.
    pub kernel_bytes: u64,
    /// File names and contents of the modules in load order, uncompressed: as `build_initramfs` takes them.
    pub modules: Vec<(String, Vec<u8>)>,
}

/// Why a bundle is refused.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// The stream is no archive.
    #[error(transparent)]
    Tar(#[from] TarError),
    /// It cannot be spooled or decompressed.
    #[error(transparent)]
    Spool(#[from] SpoolError),
    /// The archive has a file that is no part of a bundle.
    #[error("\"{0}\" is no part of a kernel bundle")]
    Unknown(String),
    /// The archive lacks a part.
    #[error("the kernel bundle has no file \"{0}\"")]
    Missing(&'static str),
    /// The kernel cannot be started.
    #[error("kernel")]
    Kernel(#[from] NotAKernel),
    /// The release is no version, or not the one that the kernel has.
    #[error("the release {release:?} is not that of the kernel ({kernel:?})")]
    Release {
        /// In the file `release`.
        release: String,
        /// In the kernel.
        kernel: String,
    },
    /// A module cannot be used.
    #[error("module {name}")]
    Module {
        /// Which.
        name: String,
        /// Why.
        source: ModuleError,
    },
    /// A module cannot be decompressed.
    #[error("decompressing module {name}")]
    Decompress {
        /// Which.
        name: String,
        /// Why.
        source: io::Error,
    },
    /// A bound was reached.
    #[error(transparent)]
    Limit(#[from] LimitReached),
}

/// Writes a bundle.
///
/// # Errors
/// `out` cannot be written, or a file has a path of more than 100 bytes or contents of more than 8 GiB.
pub fn write_kernel_bundle(files: &[BundleFile], out: &mut dyn Write) -> io::Result<()> {
    for file in files {
        out.write_all(&ustar_header(&file.path, file.contents.len())?)?;
        out.write_all(&file.contents)?;
        let padding = file.contents.len().next_multiple_of(512) - file.contents.len();
        out.write_all(&vec![0; padding])?;
    }
    out.write_all(&[0; 1024])
}

/// A header block for a regular file (IEEE 1003.1-2017, utility `pax`, "ustar Interchange Format").
fn ustar_header(path: &str, length: usize) -> io::Result<Vec<u8>> {
    if path.len() > 100 || length >= 1 << 33 {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "a name or a file that is too long for a bundle",
        ));
    }
    let head = |checksum: &str| -> Vec<u8> {
        let mut block = path.as_bytes().to_vec();
        block.resize(100, 0);
        let fields = [
            "0000644\0",
            "0000000\0",
            "0000000\0",
            &format!("{length:011o}\0"),
            "00000000000\0",
            checksum,
            "0",
        ];
        block.extend(fields.concat().into_bytes());
        block.resize(257, 0);
        block.extend(b"ustar\x0000");
        block.resize(512, 0);
        block
    };
    let sum: u32 = head("        ").into_iter().map(u32::from).sum();
    Ok(head(&format!("{sum:06o}\0 ")))
}

/// Reads and checks a bundle. `spool` is a directory for temporary files without names.
///
/// # Errors
/// See [`BundleError`].
pub fn read_kernel_bundle(
    stream: &mut dyn Read,
    spool: &Path,
    limits: &KernelLimits,
) -> Result<KernelBundle, BundleError> {
    let directory = spool;
    let mut spool = Spool::new(directory, limits.bytes);
    // One byte more than allowed is enough to see that there is too much.
    let mut decoder =
        Decoder::new(stream.take(limits.bytes.saturating_add(1))).map_err(SpoolError::Source)?;
    let (archive, _) = spool.take(&mut decoder)?;
    let parts = Parts::find(&spool, archive)?;

    let region = parts.kernel.ok_or(BundleError::Missing(KERNEL))?;
    let mut head = vec![0; usize::try_from(region.length).unwrap_or(usize::MAX).min(HEAD)];
    spool.read(region, 0, &mut head)?;
    let image = KernelImage::check(&head, region.length)?;
    let release = spool.bytes(
        parts.release.ok_or(BundleError::Missing(RELEASE))?,
        RELEASE_MAX,
        "bytes of a release",
    )?;
    let release = String::from_utf8_lossy(&release).trim_ascii().to_owned();
    if !is_release(&release) || image.release.as_ref().is_some_and(|own| *own != release) {
        let kernel = image.release.unwrap_or_default();
        return Err(BundleError::Release { release: shown(release.as_bytes()), kernel });
    }
    let modules = parts.load(&spool, &release, limits)?;
    let mut kernel = spool.copy(region)?;
    let unpacked = payload::unpack(&mut kernel, directory)
        .map_err(|source| SpoolError::Write { directory: directory.into(), source })?;
    let (mut kernel, kernel_bytes) = unpacked.unwrap_or((kernel, region.length));
    kernel.rewind().map_err(SpoolError::Read)?;
    Ok(KernelBundle { release, kernel, kernel_bytes, modules })
}

/// Where the parts of a bundle lie.
#[derive(Default)]
struct Parts {
    kernel: Option<Region>,
    release: Option<Region>,
    /// Number, name and place.
    modules: Vec<(u32, String, Region)>,
}

impl Parts {
    fn find(spool: &Spool, archive: Region) -> Result<Self, BundleError> {
        let mut parts = Self::default();
        let mut archive = Archive::new(spool, archive);
        while let Some(entry) = archive.next()? {
            let unknown = || BundleError::Unknown(shown(&entry.path));
            let path = std::str::from_utf8(&entry.path).map_err(|_| unknown())?;
            let path = path.strip_prefix("./").unwrap_or(path);
            match entry.kind {
                EntryKind::Directory => {}
                EntryKind::File(region) if path == KERNEL => parts.kernel = Some(region),
                EntryKind::File(region) if path == RELEASE => parts.release = Some(region),
                EntryKind::File(region) => {
                    let (number, name) = module_path(path).ok_or_else(unknown)?;
                    Budget::new("modules", MODULES_MAX as u64).take(parts.modules.len() as u64 + 1)?;
                    parts.modules.push((number, name.into(), region));
                }
                _ => return Err(unknown()),
            }
        }
        parts.modules.sort_by(|a, b| (a.0, &a.1).cmp(&(b.0, &b.1)));
        Ok(parts)
    }

    fn load(
        &self,
        spool: &Spool,
        release: &str,
        limits: &KernelLimits,
    ) -> Result<Vec<(String, Vec<u8>)>, BundleError> {
        let mut budget = Budget::new("bytes of modules", limits.module_bytes);
        let mut modules = vec![];
        for (_, name, region) in &self.modules {
            let packed = spool.bytes(*region, limits.module_bytes, "bytes of modules")?;
            let module = unpack(&packed, limits.module_bytes)
                .map_err(|source| BundleError::Decompress { name: name.clone(), source })?;
            budget.take(module.len() as u64)?;
            elf::check_module(&module, release)
                .map_err(|source| BundleError::Module { name: name.clone(), source })?;
            modules.push((name.clone(), module));
        }
        Ok(modules)
    }
}

/// A module without its compression, if it has any; at most one byte more than `most`.
pub(super) fn unpack(packed: &[u8], most: u64) -> io::Result<Vec<u8>> {
    let mut module = vec![];
    Decoder::new(packed)?.take(most.saturating_add(1)).read_to_end(&mut module)?;
    Ok(module)
}

/// Number and file name of `modules/NNN-name.ko…`.
fn module_path(path: &str) -> Option<(u32, &str)> {
    let (number, name) = path.strip_prefix(MODULES)?.split_once('-')?;
    let name = uncompressed_name(name);
    is_module_name(name).then_some((number.parse().ok()?, name))
}

/// A file name without the ending of a compression.
pub(super) fn uncompressed_name(name: &str) -> &str {
    [".gz", ".xz", ".zst"].iter().find_map(|ending| name.strip_suffix(ending)).unwrap_or(name)
}

/// The path of a module in a bundle.
pub(super) fn path_of_module(number: usize, name: &str) -> String {
    format!("{MODULES}{number:03}-{name}")
}

/// The parts of a bundle that are not modules.
pub(super) fn kernel_files(kernel: Vec<u8>, release: &str) -> Vec<BundleFile> {
    vec![
        BundleFile { path: KERNEL.into(), contents: kernel },
        BundleFile { path: RELEASE.into(), contents: format!("{release}\n").into_bytes() },
    ]
}
