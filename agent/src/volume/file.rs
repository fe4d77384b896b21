//! Volumes as sparse files: for hosts without device mapper.
//!
//! `volumes/VMID.img` is a copy of `templates/ext4-BYTES.img`, an empty file system that `mkfs.ext4` made once for this size.
//! Where the file system can share extents a copy is instant; elsewhere only the few hundred KiB of metadata are copied.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};

use blixard_vmm_api::VmId;

use super::{VolumeDriver, VolumeError};
use crate::{copy, durable};

/// Where `mkfs.ext4` may be. No search path: the agent runs as root.
pub const MKFS: [&str; 4] =
    ["/usr/sbin/mkfs.ext4", "/sbin/mkfs.ext4", "/usr/bin/mkfs.ext4", "/run/current-system/sw/bin/mkfs.ext4"];
/// Most templates that are kept; one is cheap to make again.
const TEMPLATES_MAX: usize = 64;

/// The driver.
#[derive(Debug)]
pub struct FileVolumes {
    volumes: PathBuf,
    templates: PathBuf,
    /// Held while templates are looked up, made or removed.
    making: Mutex<()>,
}

fn failed(operation: &'static str) -> impl Fn(io::Error) -> VolumeError {
    move |source| VolumeError::Io { operation, source }
}

impl FileVolumes {
    /// The driver with its folders in `state`.
    ///
    /// # Errors
    /// The folders cannot be made.
    pub fn open(state: &Path) -> Result<Self, VolumeError> {
        let (volumes, templates) = (state.join("volumes"), state.join("templates"));
        durable::folder(&volumes).map_err(failed("make the folder for"))?;
        durable::folder(&templates).map_err(failed("make the folder for"))?;
        Ok(Self { volumes, templates, making: Mutex::new(()) })
    }

    fn path(&self, vm: VmId) -> PathBuf {
        self.volumes.join(format!("{vm}.img"))
    }

    /// Where a volume lies until it is whole.
    fn unfinished(&self, vm: VmId) -> PathBuf {
        self.volumes.join(format!("{vm}.new"))
    }

    fn no_space(&self, size_bytes: u64, error: VolumeError) -> VolumeError {
        match error {
            VolumeError::Io { source, .. }
                if matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) =>
            {
                VolumeError::NoSpace { size_bytes, place: self.volumes.display().to_string() }
            }
            other => other,
        }
    }

    fn template(&self, size_bytes: u64) -> Result<File, VolumeError> {
        let _one_at_a_time = self.making.lock().unwrap_or_else(PoisonError::into_inner);
        let path = self.templates.join(format!("ext4-{size_bytes}.img"));
        match File::open(&path) {
            Ok(file) => return Ok(file),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed("open the template of")(error)),
        }
        self.drop_templates();
        let unfinished = path.with_extension("new");
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(true).mode(0o600);
        let file = options.open(&unfinished).map_err(failed("make the template of"))?;
        file.set_len(size_bytes).map_err(failed("make the template of"))?;
        make_file_system(&unfinished, size_bytes)?;
        file.sync_all().map_err(failed("flush the template of"))?;
        fs::rename(&unfinished, &path).map_err(failed("name the template of"))?;
        durable::sync_folder_of(&path).map_err(failed("name the template of"))?;
        File::open(&path).map_err(failed("open the template of"))
    }

    fn drop_templates(&self) {
        let Ok(entries) = fs::read_dir(&self.templates) else { return };
        let paths: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
        if paths.len() >= TEMPLATES_MAX {
            for path in paths {
                let _ = durable::remove_file(&path);
            }
        }
    }

    fn copy_template(&self, vm: VmId, size_bytes: u64) -> Result<(), VolumeError> {
        let template = self.template(size_bytes)?;
        let unfinished = self.unfinished(vm);
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(true).mode(0o600);
        let file = options.open(&unfinished).map_err(failed("make"))?;
        copy::sparse(&template, &file, size_bytes).map_err(failed("fill"))?;
        file.sync_all().map_err(failed("flush"))?;
        fs::rename(&unfinished, self.path(vm)).map_err(failed("name"))?;
        durable::sync_folder_of(&unfinished).map_err(failed("name"))
    }
}

/// Size of the journal in MiB: small volumes keep their room, large ones do not wait for a full journal.
fn journal_mib(size_bytes: u64) -> u32 {
    match size_bytes >> 20 {
        0..1024 => 4,
        1024..16_384 => 16,
        _ => 64,
    }
}

fn make_file_system(path: &Path, size_bytes: u64) -> Result<(), VolumeError> {
    let program = MKFS.iter().map(Path::new).find(|p| p.exists()).ok_or(VolumeError::NoMkfs)?;
    let journal = format!("size={}", journal_mib(size_bytes));
    let run = |extended: &str| {
        Command::new(program)
            .env_clear()
            .args(["-q", "-F", "-b", "4096", "-m", "0", "-L", "blixard", "-J", &journal, "-E", extended])
            .arg(path)
            .stdin(Stdio::null())
            .output()
            .map_err(failed("run mkfs.ext4 for"))
    };
    // The file is empty: neither mkfs nor the guest has to write zeros. Versions before 1.47 do not know the first option.
    let mut output = run("assume_storage_prezeroed=1,nodiscard")?;
    if !output.status.success() {
        output = run("lazy_itable_init=1,lazy_journal_init=1,nodiscard")?;
    }
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().chars().take(300).collect();
    Err(VolumeError::Mkfs { said })
}

impl VolumeDriver for FileVolumes {
    fn create(&self, vm: VmId, size_bytes: u64) -> Result<(), VolumeError> {
        if self.path(vm).exists() {
            return Ok(());
        }
        self.copy_template(vm, size_bytes).map_err(|error| {
            // It would hold the space that is missing.
            let _ = durable::remove_file(&self.unfinished(vm));
            self.no_space(size_bytes, error)
        })
    }

    fn open(&self, vm: VmId) -> Result<OwnedFd, VolumeError> {
        let file = OpenOptions::new().read(true).write(true).open(self.path(vm)).map_err(failed("open"))?;
        Ok(file.into())
    }

    fn remove(&self, vm: VmId) -> Result<(), VolumeError> {
        durable::remove_file(&self.unfinished(vm)).map_err(failed("remove"))?;
        durable::remove_file(&self.path(vm)).map_err(failed("remove"))?;
        durable::sync_folder_of(&self.path(vm)).map_err(failed("remove"))
    }

    fn list(&self) -> Result<BTreeMap<VmId, u64>, VolumeError> {
        let mut found = BTreeMap::new();
        for entry in fs::read_dir(&self.volumes).map_err(failed("list"))? {
            let entry = entry.map_err(failed("list"))?;
            let name = entry.file_name();
            let vm = name.to_str().and_then(|n| n.strip_suffix(".img")).and_then(|n| n.parse().ok());
            if let (Some(vm), Ok(data)) = (vm, entry.metadata()) {
                found.insert(vm, data.len());
            }
        }
        Ok(found)
    }
}
