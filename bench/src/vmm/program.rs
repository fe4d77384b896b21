//! The programs that are compared: how each is told to start a VM, and a running VM that ends with its value.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::str::FromStr;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::os::fd::AsFd;

use super::VmmError;

/// Longest that a VM may take to print its next byte, or to end.
const PATIENCE: Duration = Duration::from_secs(120);

/// Which command line a program has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// `blixard-vmm run`.
    Blixard,
    /// `firecracker --no-api --config-file`.
    Firecracker,
}

/// A peer on the command line: `firecracker=PATH`.
#[derive(Debug, Clone)]
pub struct Peer(pub PathBuf);

impl FromStr for Peer {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            Some(("firecracker", path)) if !path.is_empty() => Ok(Self(path.into())),
            _ => Err("only firecracker=PATH is known".into()),
        }
    }
}

/// What a VM is made of.
#[derive(Debug, Clone)]
pub struct Shape {
    /// Kernel image.
    pub kernel: PathBuf,
    /// Initial RAM file system, if any.
    pub initramfs: Option<PathBuf>,
    /// Kernel command line.
    pub cmdline: String,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Ours: memory from which a fork copies nothing.
    pub fork_ready: bool,
    /// Disks and nic.
    pub devices: Devices,
}

/// Devices of a VM, and how a program does them where it has a choice.
#[derive(Debug, Clone, Default)]
pub struct Devices {
    /// Backings of disks, and whether they are read-only.
    pub disks: Vec<(PathBuf, bool)>,
    /// The tap of a nic.
    pub tap: Option<String>,
    /// Ours: the kernel passes the frames of the nic.
    pub vhost: bool,
    /// Firecracker: devices on a PCI bus instead of virtio-mmio.
    pub pci: bool,
    /// Firecracker: disks by io_uring instead of one call after the other.
    pub async_disks: bool,
}

/// One of the programs.
#[derive(Debug, Clone)]
pub struct Program {
    /// Its command line.
    pub kind: Kind,
    /// The file.
    pub path: PathBuf,
}

impl Program {
    /// The command that starts a VM of this shape; `folder` takes what files it needs.
    pub fn command(&self, shape: &Shape, folder: &Path) -> Result<Command, VmmError> {
        let mut command = self.start(shape, folder)?;
        if self.kind == Kind::Firecracker {
            command.arg("--no-api");
        }
        Ok(command)
    }

    /// The same for a VM that is asked things on `socket`.
    pub fn command_with_socket(
        &self,
        shape: &Shape,
        folder: &Path,
        socket: &Path,
    ) -> Result<Command, VmmError> {
        let mut command = self.start(shape, folder)?;
        command.arg(if self.kind == Kind::Blixard { "--control" } else { "--api-sock" }).arg(socket);
        Ok(command)
    }

    fn start(&self, shape: &Shape, folder: &Path) -> Result<Command, VmmError> {
        let mut command = Command::new(&self.path);
        let devices = &shape.devices;
        match self.kind {
            Kind::Blixard => {
                command.args(["run", "--no-stdin", "--boot-timer", "--cmdline", &shape.cmdline]);
                command.arg("--memory").arg(shape.memory_mib.to_string()).arg("--kernel").arg(&shape.kernel);
                if let Some(initramfs) = &shape.initramfs {
                    command.arg("--initramfs").arg(initramfs);
                }
                if shape.fork_ready {
                    command.arg("--fork-ready");
                }
                for (path, read_only) in &devices.disks {
                    let mode = if *read_only { ",ro" } else { "" };
                    command.arg("--disk").arg(format!("{}{mode}", path.display()));
                }
                if let Some(tap) = &devices.tap {
                    command.arg("--tap").arg(format!("{tap}{}", if devices.vhost { ",vhost" } else { "" }));
                }
            }
            Kind::Firecracker => {
                let mut source = serde_json::json!({
                    "kernel_image_path": shape.kernel,
                    "boot_args": shape.cmdline,
                });
                if let (Some(initramfs), Some(fields)) = (&shape.initramfs, source.as_object_mut()) {
                    fields.insert("initrd_path".into(), serde_json::json!(initramfs));
                }
                let engine = if devices.async_disks { "Async" } else { "Sync" };
                let drives = (0..).zip(&devices.disks).map(|(number, (path, read_only))| {
                    serde_json::json!({"drive_id": format!("disk{number}"), "path_on_host": path, "is_root_device": false,
                        "is_read_only": read_only, "io_engine": engine})
                });
                let nics = devices.tap.iter().map(|tap| {
                    serde_json::json!({"iface_id": "nic0", "guest_mac": "52:54:00:00:00:00", "host_dev_name": tap})
                });
                let config = serde_json::json!({
                    "boot-source": source,
                    "drives": drives.collect::<Vec<_>>(),
                    "network-interfaces": nics.collect::<Vec<_>>(),
                    "machine-config": {"vcpu_count": 1, "mem_size_mib": shape.memory_mib},
                });
                let path = folder.join("firecracker.json");
                // Another starter's Firecracker may be reading it.
                let config = config.to_string();
                if fs::read_to_string(&path).ok().as_ref() != Some(&config) {
                    fs::write(&path, config).map_err(|e| VmmError::file(&path, e))?;
                }
                command.args(["--boot-timer", "--level", "Error", "--log-path", "/dev/null"]);
                command.arg("--config-file").arg(path);
                if devices.pci {
                    command.arg("--enable-pci");
                }
            }
        }
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
        Ok(command)
    }
}

/// A VM that runs; it is killed when it is dropped.
pub struct Running {
    program: PathBuf,
    child: Child,
    output: ChildStdout,
    begun: Instant,
    heard: String,
    last: bool,
}

impl Running {
    /// Starts `command`; the clock runs from just before.
    pub fn start(mut command: Command) -> Result<Self, VmmError> {
        let program = PathBuf::from(command.get_program());
        let begun = Instant::now();
        let mut child =
            command.spawn().map_err(|source| VmmError::Start { program: program.clone(), source })?;
        let output = child.stdout.take().ok_or(VmmError::NoOutput)?;
        Ok(Self { program, child, output, begun, heard: String::new(), last: false })
    }

    /// Number of the process.
    pub fn process(&self) -> u32 {
        self.child.id()
    }

    /// Reads until `text` was printed; the time since the start.
    pub fn hears(&mut self, text: &str) -> Result<Duration, VmmError> {
        loop {
            if let Some(at) = self.heard.find(text) {
                let end = at.saturating_add(text.len());
                self.heard = self.heard.get(end..).unwrap_or_default().to_owned();
                return Ok(self.begun.elapsed());
            }
            if self.last || !self.read()? {
                return Err(self.silent(text));
            }
        }
    }

    /// Reads until a line with `text` is complete; what follows `text` in it.
    pub fn hears_line(&mut self, text: &str) -> Result<String, VmmError> {
        self.hears(text)?;
        loop {
            if let Some((line, rest)) = self.heard.split_once('\n') {
                let (line, rest) = (line.trim().to_owned(), rest.to_owned());
                self.heard = rest;
                return Ok(line);
            }
            if self.last || !self.read()? {
                return Err(self.silent(text));
            }
        }
    }

    /// That `text` was not printed, with what became of the program.
    fn silent(&mut self, text: &str) -> VmmError {
        // After the end of its output it ends, if it has not yet.
        let status = if self.last { self.child.wait().map(Some) } else { self.child.try_wait() };
        let ended = match status {
            Ok(Some(status)) => format!("ended, {status}"),
            Ok(None) => "still runs".to_owned(),
            Err(error) => error.to_string(),
        };
        let program = self.program.clone();
        VmmError::Silent { program, text: text.into(), heard: self.heard.clone(), ended }
    }

    /// Reads more; false at the end of the output or of patience.
    fn read(&mut self) -> Result<bool, VmmError> {
        let limit = PollTimeout::try_from(PATIENCE).unwrap_or(PollTimeout::NONE);
        let ready = loop {
            match poll(&mut [PollFd::new(self.output.as_fd(), PollFlags::POLLIN)], limit) {
                Err(Errno::EINTR) => {}
                other => break other.map_err(VmmError::Poll)?,
            }
        };
        let mut bytes = [0; 4096];
        let count = if ready == 0 { 0 } else { self.output.read(&mut bytes).map_err(VmmError::Read)? };
        self.heard.push_str(&String::from_utf8_lossy(bytes.get(..count).unwrap_or_default()));
        self.last = count == 0;
        Ok(count > 0)
    }

    /// Waits for the end of the process; the time since its start.
    pub fn ends(mut self) -> Result<Duration, VmmError> {
        self.child.wait().map_err(VmmError::Read)?;
        Ok(self.begun.elapsed())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended, and been waited for, already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
