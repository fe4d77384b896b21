//! Mounts: the kernel's file systems, the root from image and volume, and the change into it.

use std::fs::{DirBuilder, File, Permissions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

use blixard_vmm_api::guest::RootConfig;
use nix::mount::{MsFlags, mount};

use crate::devices::{self, Announcements};

const IMAGE: &str = "/mnt/image";
const VOLUME: &str = "/mnt/volume";
const ROOT: &str = "/mnt/root";
/// How long a disk may take to appear. Probing is done when a module's loading returns; this is for hosts that are
/// short of time.
const DISK_LIMIT: Duration = Duration::from_secs(30);

/// What can go wrong on the way to the root.
#[derive(Debug, thiserror::Error)]
pub enum RootError {
    /// No disk with this serial number has appeared.
    #[error("no disk has the serial number {serial:?} (there are: {})", .found.join(", "))]
    NoDisk {
        /// The serial number asked for.
        serial: String,
        /// The serial numbers there are.
        found: Vec<String>,
    },
    /// A directory cannot be made.
    #[error("making {path}")]
    Directory {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A mount is refused.
    #[error("mounting {what} as {kind} on {target}")]
    Mount {
        /// Device or name.
        what: String,
        /// File system.
        kind: String,
        /// Where.
        target: PathBuf,
        /// The kernel's answer; its reasons are in the kernel log.
        source: nix::Error,
    },
    /// The change into the new root is refused.
    #[error("changing into the new root")]
    Switch(#[source] nix::Error),
}

/// The writable file system below the root, to be made read-only again before power off.
#[derive(Debug)]
pub struct Volume(File);

impl Volume {
    /// Writes everything out and makes the file system read-only.
    ///
    /// # Errors
    /// Something still writes.
    pub fn close(&self) -> nix::Result<()> {
        // The mount is hidden below the root; only an open descriptor still leads to it.
        let path = format!("/proc/self/fd/{}", self.0.as_raw_fd());
        mount(
            None::<&str>,
            path.as_str(),
            None::<&str>,
            MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY,
            None::<&str>,
        )
    }
}

fn directory(path: &Path, mode: u32) -> Result<(), RootError> {
    let made = DirBuilder::new().recursive(true).mode(mode).create(path);
    made.map_err(|source| RootError::Directory { path: path.into(), source })
}

fn mount_on(what: &str, kind: &str, target: &str, flags: MsFlags, options: &str) -> Result<(), RootError> {
    directory(Path::new(target), 0o755)?;
    mount(Some(what), target, Some(kind), flags, Some(options)).map_err(|source| RootError::Mount {
        what: what.into(),
        kind: kind.into(),
        target: target.into(),
        source,
    })
}

/// Mounts what init itself needs: `/dev`, `/proc`, `/sys`.
///
/// # Errors
/// The kernel lacks one of them.
pub fn mount_first() -> Result<(), RootError> {
    let plain = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
    mount_on("dev", "devtmpfs", "/dev", MsFlags::MS_NOSUID, "mode=0755")?;
    mount_on("proc", "proc", "/proc", plain | MsFlags::MS_NODEV, "")?;
    mount_on("sysfs", "sysfs", "/sys", plain | MsFlags::MS_NODEV, "")
}

/// Mounts the rest of what programs expect. `/run` and `/tmp` stay as the image has them: images keep files there
/// that their programs need.
///
/// # Errors
/// A directory cannot be made or `/dev/pts` cannot be mounted. A kernel without control groups is reported by
/// `minor` only.
pub fn mount_rest(minor: impl Fn(&RootError)) -> Result<(), RootError> {
    let safe = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
    mount_on("devpts", "devpts", "/dev/pts", safe, "mode=0620,gid=5,ptmxmode=0666")?;
    mount_on("shm", "tmpfs", "/dev/shm", MsFlags::MS_NOSUID | MsFlags::MS_NODEV, "mode=1777")?;
    let groups = mount_on("cgroup2", "cgroup2", "/sys/fs/cgroup", safe | MsFlags::MS_NODEV, "nsdelegate");
    if let Err(error) = groups {
        minor(&error);
    }
    for (name, target) in [
        ("fd", "/proc/self/fd"),
        ("stdin", "/proc/self/fd/0"),
        ("stdout", "/proc/self/fd/1"),
        ("stderr", "/proc/self/fd/2"),
    ] {
        // The kernel may have made them already; then they are these.
        let _exists = symlink(target, Path::new("/dev").join(name));
    }
    directory(Path::new("/run"), 0o755)?;
    if !Path::new("/tmp").exists() {
        directory(Path::new("/tmp"), 0o777)?;
        let path = PathBuf::from("/tmp");
        std::fs::set_permissions(&path, Permissions::from_mode(0o1777))
            .map_err(|source| RootError::Directory { path, source })?;
    }
    Ok(())
}

/// Mounts image and volume, lays one over the other, changes into the result and frees the initramfs.
///
/// # Errors
/// A disk is missing or holds no such file system.
pub fn enter(config: &RootConfig, announcements: &Announcements) -> Result<Option<Volume>, RootError> {
    let find = |serial: &str| {
        let sys = Path::new("/sys");
        let found = announcements.wait_for(DISK_LIMIT, || devices::disk(sys, serial));
        found
            .and_then(|path| path.into_os_string().into_string().ok())
            .ok_or_else(|| RootError::NoDisk { serial: serial.into(), found: devices::serials(sys) })
    };
    // A journal cannot be replayed on a shared read-only disk.
    let options = if config.image_fs == "ext4" { "noload" } else { "" };
    mount_on(&find(&config.image_disk)?, &config.image_fs, IMAGE, MsFlags::MS_RDONLY, options)?;
    let volume = match &config.volume_disk {
        Some(serial) => {
            mount_on(&find(serial)?, "ext4", VOLUME, MsFlags::empty(), "")?;
            let opened = File::options().read(true).custom_flags(libc::O_DIRECTORY).open(VOLUME);
            Some(Volume(opened.map_err(|source| RootError::Directory { path: VOLUME.into(), source })?))
        }
        None => {
            mount_on("volume", "tmpfs", VOLUME, MsFlags::empty(), "mode=0755")?;
            None
        }
    };
    let (upper, work) = (format!("{VOLUME}/upper"), format!("{VOLUME}/work"));
    directory(Path::new(&upper), 0o755)?;
    directory(Path::new(&work), 0o755)?;
    let layers = format!("lowerdir={IMAGE},upperdir={upper},workdir={work}");
    mount_on("root", "overlay", ROOT, MsFlags::empty(), &layers)?;
    for name in ["dev", "proc", "sys"] {
        directory(&Path::new(ROOT).join(name), 0o755)?;
    }
    switch().map_err(RootError::Switch)?;
    // Fresh mounts rather than moved ones: a link in the image, such as `/dev -> elsewhere`, cannot lead out of it now.
    mount_first()?;
    Ok(volume)
}

fn switch() -> nix::Result<()> {
    nix::unistd::chdir(ROOT)?;
    if let Ok(root) = std::fs::symlink_metadata("/") {
        free(Path::new("/"), root.dev());
    }
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>)?;
    nix::unistd::chroot(".")?;
    nix::unistd::chdir("/")
}

/// Deletes all files of the file system `device` at and below `path`: what the initramfs holds is memory. Other
/// mounts are left alone, and so is what cannot be deleted: it costs a little memory and nothing else.
fn free(path: &Path, device: u64) {
    let Ok(entries) = std::fs::read_dir(path) else { return };
    for entry in entries.flatten() {
        let path = entry.path();
        match std::fs::symlink_metadata(&path) {
            Ok(found) if found.dev() != device => {}
            Ok(found) if found.is_dir() => {
                free(&path, device);
                let _mount_point = std::fs::remove_dir(&path);
            }
            _ => {
                let _kept = std::fs::remove_file(&path);
            }
        }
    }
}
