//! Chooses what a guest needs of a host's kernel and modules.
//!
//! What a module needs is read from the module itself, not from `modules.dep`: that file is made on the host by depmod
//! and is missing where a kernel package was only unpacked.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};

use super::bundle::{BundleFile, kernel_files, path_of_module, uncompressed_name, unpack};
use super::elf::{self, ModuleError};
use super::image::{KernelImage, NotAKernel, is_release};

/// Most bytes of one module without compression.
const MODULE_MAX: u64 = 128 << 20;
/// Most directories within each other below the modules directory.
const DEPTH_MAX: usize = 32;

/// The modules a guest needs, in the order in which they are loaded: first what leads to the host, so that init can
/// report early, then what the root is made of.
const WANTED: [(&str, Need); 14] = [
    ("virtio_pci", Need::For("all devices")),
    ("vmw_vsock_virtio_transport", Need::For("exec and status")),
    ("virtio_blk", Need::For("disks")),
    // Names of algorithms that ext4 and others ask the kernel for; no module names them as needed.
    ("crc32c_generic", Need::IfThere),
    ("crc32c_intel", Need::IfThere),
    ("erofs", Need::For("images")),
    ("overlay", Need::For("the root file system")),
    ("ext4", Need::For("volumes")),
    ("virtio_net", Need::For("networks")),
    ("af_packet", Need::IfThere),
    ("ipv6", Need::IfThere),
    ("virtio_rng", Need::IfThere),
    ("virtio_balloon", Need::IfThere),
    ("squashfs", Need::IfThere),
];

#[derive(Clone, Copy)]
enum Need {
    For(&'static str),
    IfThere,
}

/// Why a kernel cannot be collected.
#[derive(Debug, thiserror::Error)]
pub enum CollectError {
    /// A file cannot be read.
    #[error("reading {path}")]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The kernel cannot be started as a guest.
    #[error("{path}")]
    Kernel {
        /// Which.
        path: PathBuf,
        /// Why.
        source: NotAKernel,
    },
    /// Neither the kernel nor the name of the modules directory is a version.
    #[error("{0} is not named after a kernel version")]
    NoRelease(PathBuf),
    /// A module that guests cannot do without is neither there nor built in.
    #[error(
        "module {name}, which guests need for {purpose}, is neither in {directory} nor built into the kernel"
    )]
    Missing {
        /// Which.
        name: &'static str,
        /// What for.
        purpose: &'static str,
        /// Where it was looked for.
        directory: PathBuf,
    },
    /// A module needs another one that is neither there nor built in.
    #[error("module {by} needs {name}, which is neither in {directory} nor built into the kernel")]
    Needed {
        /// What is missing.
        name: String,
        /// Who needs it.
        by: String,
        /// Where it was looked for.
        directory: PathBuf,
    },
    /// A module is none, or of another kernel.
    #[error("{path}")]
    Module {
        /// Which.
        path: PathBuf,
        /// Why.
        source: ModuleError,
    },
}

/// Reads the kernel and chooses the modules from `modules` (such as `/lib/modules/6.1.0-9-amd64`).
///
/// # Errors
/// See [`CollectError`].
pub fn collect_kernel(vmlinuz: &Path, modules: &Path) -> Result<Vec<BundleFile>, CollectError> {
    let kernel = read(vmlinuz)?;
    let length = u64::try_from(kernel.len()).unwrap_or(u64::MAX);
    let image = KernelImage::check(&kernel, length)
        .map_err(|source| CollectError::Kernel { path: vmlinuz.into(), source })?;
    let named = modules.file_name().and_then(|name| name.to_str()).filter(|name| is_release(name));
    let release = image.release.or_else(|| named.map(str::to_owned));
    let release = release.ok_or_else(|| CollectError::NoRelease(modules.into()))?;
    let mut choice = Choice {
        directory: modules,
        release: &release,
        files: BTreeMap::new(),
        built_in: BTreeSet::new(),
        taken: BTreeSet::new(),
        chosen: vec![],
    };
    choice.find_modules(modules, 0)?;
    choice.find_built_in()?;
    for (name, need) in WANTED {
        match (choice.take(name)?, need) {
            (true, _) | (false, Need::IfThere) => {}
            (false, Need::For(purpose)) => {
                return Err(CollectError::Missing { name, purpose, directory: modules.into() });
            }
        }
    }
    let chosen = choice.chosen;
    let mut files = kernel_files(kernel, &release);
    files.extend(
        chosen
            .into_iter()
            .enumerate()
            .map(|(number, (name, contents))| BundleFile { path: path_of_module(number, &name), contents }),
    );
    Ok(files)
}

fn read(path: &Path) -> Result<Vec<u8>, CollectError> {
    std::fs::read(path).map_err(|source| CollectError::Read { path: path.into(), source })
}

/// A module's name as the kernel has it: `-` and `_` are the same.
fn canonical(name: &str) -> String {
    name.replace('-', "_")
}

struct Choice<'a> {
    directory: &'a Path,
    release: &'a str,
    /// Files by canonical name.
    files: BTreeMap<String, PathBuf>,
    built_in: BTreeSet<String>,
    taken: BTreeSet<String>,
    chosen: Vec<(String, Vec<u8>)>,
}

impl Choice<'_> {
    /// Lists all modules below `directory`. Links are not followed: they lead to sources and build trees.
    fn find_modules(&mut self, directory: &Path, depth: usize) -> Result<(), CollectError> {
        let failed = |source| CollectError::Read { path: directory.into(), source };
        for entry in std::fs::read_dir(directory).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let kind = entry.file_type().map_err(failed)?;
            if kind.is_dir() && depth < DEPTH_MAX {
                self.find_modules(&entry.path(), depth + 1)?;
            } else if kind.is_file()
                && let Some(name) = entry.file_name().to_str()
                && let Some(name) = uncompressed_name(name).strip_suffix(".ko")
            {
                self.files.insert(canonical(name), entry.path());
            }
        }
        Ok(())
    }

    fn find_built_in(&mut self) -> Result<(), CollectError> {
        let text = String::from_utf8_lossy(&read(&self.directory.join("modules.builtin"))?).into_owned();
        let names = text.lines().filter_map(|line| line.rsplit('/').next()?.strip_suffix(".ko"));
        self.built_in = names.map(canonical).collect();
        Ok(())
    }

    /// Takes a module and those it needs, these first; false if there is none and it is not built in.
    fn take(&mut self, name: &str) -> Result<bool, CollectError> {
        let name = canonical(name);
        if self.built_in.contains(&name) || self.taken.contains(&name) {
            return Ok(true);
        }
        let Some(path) = self.files.get(&name).cloned() else { return Ok(false) };
        self.taken.insert(name.clone());
        let module = unpack(&read(&path)?, MODULE_MAX)
            .map_err(|source| CollectError::Read { path: path.clone(), source })?;
        let wrong = |source| CollectError::Module { path: path.clone(), source };
        elf::check_module(&module, self.release).map_err(wrong)?;
        for needed in elf::needed(&module).map_err(wrong)? {
            if !self.take(needed)? {
                let (name, by) = (needed.to_owned(), name);
                return Err(CollectError::Needed { name, by, directory: self.directory.into() });
            }
        }
        self.chosen.push((format!("{name}.ko"), module));
        Ok(true)
    }
}
