//! Guest kernels: from a bundle that somebody sends, or from the host's own files.

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::path::Path;

use blixard_agent_api::{BlobRef, Digest};
use blixard_images::build_initramfs;
use blixard_images::kernel::{KernelLimits, collect_kernel, read_kernel_bundle, write_kernel_bundle};
use sha2::{Digest as _, Sha256};

use super::import::{ImportFailure, Importer};
use crate::clock;
use crate::state::KernelRecord;

/// Largest init program in bytes.
const INIT_BYTES_MAX: u64 = 64 << 20;

impl Importer {
    /// Reads a kernel bundle, and keeps the kernel and an initramfs with our init and its modules.
    ///
    /// # Errors
    /// See [`ImportFailure`]. Nothing is left behind but content that the next sweep removes.
    pub fn kernel(&self, name: String, source: &mut dyn Read) -> Result<KernelRecord, ImportFailure> {
        let init = self.init_program()?;
        let spool = self.blobs().spool();
        let mut bundle = read_kernel_bundle(source, spool, &KernelLimits::default())
            .map_err(|error| ImportFailure::Kernel(Box::new(error)))?;
        let kernel = self.keep_hashed(|out| io::copy(&mut bundle.kernel, out).map(|_| ()))?;
        let mut refused = None;
        let initramfs = self.keep_hashed(|out| match build_initramfs(&init, &bundle.modules, out) {
            Ok(()) => Ok(()),
            Err(error) => {
                refused = Some(error);
                Err(io::Error::other("the initramfs cannot be built"))
            }
        });
        let initramfs = match (initramfs, refused) {
            (_, Some(error)) => return Err(ImportFailure::Initramfs(error)),
            (kept, None) => kept?,
        };
        Ok(KernelRecord {
            name,
            release: bundle.release,
            kernel,
            initramfs,
            modules: bundle.modules.into_iter().map(|(file, _)| file).collect(),
            created_at_ms: clock::now_ms(),
        })
    }

    /// Takes the kernel that this host runs, with its modules.
    ///
    /// # Errors
    /// See [`ImportFailure`]; on many hosts the kernel may only be read by root.
    pub fn host_kernel(&self, name: String) -> Result<KernelRecord, ImportFailure> {
        let release =
            std::fs::read_to_string("/proc/sys/kernel/osrelease").map_err(ImportFailure::Temporary)?;
        let release = release.trim();
        let (kernel, modules) = (format!("/boot/vmlinuz-{release}"), format!("/lib/modules/{release}"));
        let files = collect_kernel(Path::new(&kernel), Path::new(&modules))
            .map_err(|error| ImportFailure::HostKernel(Box::new(error)))?;
        let mut bundle = tempfile::tempfile_in(self.blobs().spool()).map_err(ImportFailure::Temporary)?;
        write_kernel_bundle(&files, &mut bundle).map_err(ImportFailure::Temporary)?;
        bundle.rewind().map_err(ImportFailure::Temporary)?;
        self.kernel(name, &mut bundle)
    }

    fn init_program(&self) -> Result<Vec<u8>, ImportFailure> {
        let path = self.init();
        let read = || -> io::Result<Vec<u8>> {
            let mut bytes = Vec::new();
            File::open(path)?.take(INIT_BYTES_MAX).read_to_end(&mut bytes)?;
            Ok(bytes)
        };
        read().map_err(|source| ImportFailure::Init { path: path.to_owned(), source })
    }

    /// Keeps what `write` writes.
    fn keep_hashed(
        &self,
        write: impl FnOnce(&mut dyn Write) -> io::Result<()>,
    ) -> Result<BlobRef, ImportFailure> {
        let mut temporary =
            tempfile::NamedTempFile::new_in(self.blobs().spool()).map_err(ImportFailure::Temporary)?;
        let mut out = Hashed { file: temporary.as_file_mut(), hash: Sha256::new() };
        write(&mut out).map_err(ImportFailure::Temporary)?;
        let digest = Digest::from_bytes(out.hash.finalize().into());
        self.keep(digest, temporary)
    }
}

struct Hashed<'a> {
    file: &'a mut File,
    hash: Sha256,
}

impl Write for Hashed<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.file.write(bytes)?;
        self.hash.update(bytes.get(..count).unwrap_or(bytes));
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}
