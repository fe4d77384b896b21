//! Stock kernels: found on the host, and made ready for a guest the way `blixard kernel import` does it.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use blixard_images::build_initramfs;
use blixard_images::kernel::{KernelLimits, collect_kernel, read_kernel_bundle, write_kernel_bundle};

use crate::host::{PROGRAMS, run};

/// Where the kernel of Debian's backports is unpacked, when it is there.
const BACKPORTS: &str = "/opt/backports";

/// A kernel as VMs get it.
pub struct Kernel {
    /// Its version, as `uname -r` shows it.
    pub release: String,
    /// The kernel, unpacked.
    pub kernel: PathBuf,
    /// Its initramfs: our init and the modules that each guest gets.
    pub initramfs: PathBuf,
    /// Drivers of persistent memory, uncompressed and in load order, which guests do not get by themselves.
    pub pmem_modules: Vec<(String, Vec<u8>)>,
}

impl Kernel {
    /// The kernel called `cloud`, `generic` or `backports`, made ready in `folder`.
    pub fn prepare(name: &str, folder: &Path) -> Self {
        let (boot, modules) = match name {
            "backports" => (format!("{BACKPORTS}/boot"), format!("{BACKPORTS}/lib/modules")),
            _ => ("/boot".into(), "/lib/modules".into()),
        };
        let releases = fs::read_dir(&modules).unwrap_or_else(|e| panic!("{name} kernel: {modules}: {e}"));
        let mut names = releases.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let release =
            names.find(|release| name == "backports" || (name == "cloud") == release.contains("cloud"));
        let release = release.unwrap_or_else(|| panic!("no {name} kernel in {modules}"));
        let modules = Path::new(&modules).join(&release);
        let files = collect_kernel(&Path::new(&boot).join(format!("vmlinuz-{release}")), &modules).unwrap();
        let mut bundle = vec![];
        write_kernel_bundle(&files, &mut bundle).unwrap();
        let mut bundle =
            read_kernel_bundle(&mut bundle.as_slice(), folder, &KernelLimits::default()).unwrap();
        let kernel = folder.join("kernel");
        io::copy(&mut bundle.kernel, &mut File::create(&kernel).unwrap()).unwrap();
        let initramfs = folder.join("initramfs");
        let init = fs::read(format!("{PROGRAMS}/blixard-init")).unwrap();
        build_initramfs(&init, &bundle.modules, &mut File::create(&initramfs).unwrap()).unwrap();
        // Once for all: the folder may be the host's, where each look costs a round trip.
        let found = run("find", &[modules.to_str().unwrap(), "-name", "*.ko*"]);
        let files: Vec<&str> = found.lines().collect();
        let mut pmem_modules = vec![];
        let mut seen = BTreeSet::new();
        for name in ["virtio_pmem", "nd_pmem"] {
            add_module(&files, name, &mut seen, &mut pmem_modules);
        }
        Self { release: bundle.release, kernel, initramfs, pmem_modules }
    }
}

/// Adds a module behind those that it needs; one that is built in has no file.
fn add_module(files: &[&str], name: &str, seen: &mut BTreeSet<String>, to: &mut Vec<(String, Vec<u8>)>) {
    let name = name.replace('-', "_");
    if !seen.insert(name.clone()) {
        return;
    }
    let is_it = |path: &&str| {
        let file = path.rsplit('/').next().unwrap();
        file.split(".ko").next().unwrap().replace('-', "_") == name
    };
    let Some(path) = files.iter().copied().find(is_it) else { return };
    for needed in run("modinfo", &["-F", "depends", path]).trim().split(',').filter(|name| !name.is_empty()) {
        add_module(files, needed, seen, to);
    }
    let bytes = match path.ends_with(".xz") {
        true => run_bytes("busybox", &["xzcat", path]),
        false => fs::read(path).unwrap(),
    };
    to.push((format!("{:02}-{name}.ko", to.len()), bytes));
}

fn run_bytes(program: &str, args: &[&str]) -> Vec<u8> {
    let output = std::process::Command::new(program).args(args).output().unwrap();
    assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}
