//! Builds the host image with `mmdebstrap`: root disk, kernel, initramfs, ssh key, and the static busybox that
//! guest images are made of. Needs no loop device and, with sub-uids, no root.

use crate::cache::{self, Cache, Entry, Kind};
use crate::leash::{self, Leash};
use crate::say::say;
use crate::work::{self, WorkFolder};
use crate::{programs, recipe, shell};
use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

/// What can go wrong.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The cache failed.
    #[error("cannot use the cache")]
    Cache(#[from] cache::Error),
    /// Programs are missing.
    #[error("this machine cannot build images")]
    Missing(#[from] programs::Missing),
    /// No folder to build in.
    #[error("cannot start a build")]
    Folder(#[from] work::Error),
    /// A step could not be started or was stopped.
    #[error("cannot {what}")]
    Run {
        /// The step.
        what: &'static str,
        /// The cause.
        #[source]
        source: leash::Error,
    },
    /// A step failed; it has told why on standard error.
    #[error("{what} failed{hint}")]
    Step {
        /// The step.
        what: &'static str,
        /// What to do about it, when that is known.
        hint: &'static str,
    },
    /// A file could not be written.
    #[error("cannot write {path}")]
    Write {
        /// The file.
        path: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

const HINT_USER: &str = "; without root this needs user namespaces, newuidmap (package uidmap) and a line for \
    this user in /etc/subuid and /etc/subgid - or run `blixard-rig build` as root with BLIXARD_RIG_CACHE set";

/// The host image; built when there is none of this recipe.
pub fn ensure(cache: &Cache, leash: &Leash) -> Result<Entry, Error> {
    cache.ensure(Kind::Image, &recipe::image_key(), leash, |new| build(new, leash))
}

fn build(new: &Path, leash: &Leash) -> Result<(), Error> {
    programs::check()?;
    say("building the host image (once for this recipe)");
    let start = Instant::now();
    let builder = Builder::new(leash)?;
    let root = builder.work.path().join("root");
    let out = builder.out()?;
    let mut command = builder.mmdebstrap();
    command.args(["--variant=minbase", "--components=main", "--format=directory"]);
    command.args(recipe::left_out().iter().map(|pattern| format!("--dpkgopt=path-exclude={pattern}")));
    command.arg(format!("--include={}", recipe::packages().join(",")));
    command.arg(recipe::SUITE).arg(&root).args(sources());
    builder.step("install the packages", &mut command)?;
    builder.step("prepare the root file system", &mut builder.inside(&finish_script(&root, &out)))?;
    for name in ["kernel", "initramfs", "busybox", "applets", "key", "root.ext4"] {
        builder.take(&out.join(name), &new.join(name))?;
    }
    chmod(&new.join("key"), 0o600)?; // ssh refuses keys that others can read
    say(format_args!("host image built in {:.0} s", start.elapsed().as_secs_f32()));
    Ok(())
}

/// Runs as the owner of the new file system: prepares it, then takes out what QEMU needs. Sub-uids cannot make
/// device nodes; the one that is needed now is lent to them, in their own mount namespace.
fn finish_script(root: &Path, out: &Path) -> String {
    let (root, out) = (shell::quote(&root.to_string_lossy()), shell::quote(&out.to_string_lossy()));
    format!(
        "set -eu; umask 022
        [ -c {root}/dev/null ] || {{ : >{root}/dev/null; mount --bind /dev/null {root}/dev/null; bound=1; }}
        chroot {root} /bin/sh -c {setup}
        [ -z \"${{bound-}}\" ] || {{ umount {root}/dev/null; rm {root}/dev/null; }}
        for file in boot/rig/kernel boot/rig/initramfs boot/rig/applets bin/busybox; do cp -L {root}/$file {out}; done
        cp {root}/root/.ssh/id_ed25519 {out}/key
        mkfs.ext4 -qF -L root -E lazy_itable_init=1 -d {root} {out}/root.ext4 {size}
        chmod 644 {out}/*",
        setup = shell::quote(recipe::SETUP),
        size = recipe::ROOT_SIZE >> 10, // a size without a unit is in KiB
    )
}

fn remove_script(paths: &[&Path]) -> String {
    let paths: Vec<_> = paths.iter().map(|path| shell::quote(&path.to_string_lossy())).collect();
    // What belongs to us, such as the folders themselves, goes with the working folder.
    format!("for d in {}; do find $d -xdev -mindepth 1 -delete 2>/dev/null || :; done", paths.join(" "))
}

/// Runs `mmdebstrap` as root, or as a user in a namespace of sub-uids.
pub struct Builder<'a> {
    leash: &'a Leash,
    work: WorkFolder,
    root: bool,
}

impl<'a> Builder<'a> {
    /// Makes a working folder that the sub-uids can reach too.
    pub fn new(leash: &'a Leash) -> Result<Self, Error> {
        let work = WorkFolder::new()?;
        let root = nix::unistd::geteuid().is_root();
        if !root {
            chmod(work.path(), 0o711)?;
        }
        make_open(&work.path().join("tmp"))?;
        Ok(Self { leash, work, root })
    }

    /// The common part of a call of `mmdebstrap`.
    pub fn mmdebstrap(&self) -> Command {
        let mut command = self.tied("mmdebstrap");
        command.arg(if self.root { "--mode=root" } else { "--mode=unshare" });
        command.args(["--aptopt=Acquire::Languages none", "--dpkgopt=force-unsafe-io"]);
        command.env("TMPDIR", self.work.path().join("tmp"));
        command
    }

    /// A program whose descendants die with it: in a process namespace of its own. A user cannot make one here
    /// without losing the sub-uids; then what a killed `mmdebstrap` has started runs to its end.
    fn tied(&self, program: &str) -> Command {
        if !self.root {
            return programs::command(program);
        }
        let mut command = programs::command("unshare");
        command.args(["--pid", "--fork", "--kill-child", "--mount-proc", program]);
        command
    }

    /// A folder for results, which the sub-uids can write to.
    pub fn out(&self) -> Result<PathBuf, Error> {
        let out = self.work.path().join("out");
        make_open(&out)?;
        Ok(out)
    }

    /// Copies a result to its place; it belongs to us then and keeps its holes.
    pub fn take(&self, from: &Path, to: &Path) -> Result<(), Error> {
        let mut copy = programs::command("cp");
        copy.arg("--sparse=always").arg(from).arg(to);
        self.step("copy the results", &mut copy)
    }

    /// A shell script that runs as the owner of the files `mmdebstrap` made.
    fn inside(&self, script: &str) -> Command {
        let mut command = self.tied(if self.root { "sh" } else { "mmdebstrap" });
        if !self.root {
            command.args(["--unshare-helper", "unshare", "--mount", "sh"]);
        }
        command.args(["-c", script]).env("LC_ALL", "C.UTF-8");
        command
    }

    /// Runs one step; its output goes to standard error.
    pub fn step(&self, what: &'static str, command: &mut Command) -> Result<(), Error> {
        command.stdin(Stdio::null()).stdout(io::stderr());
        let status = self.leash.run(command).map_err(|source| Error::Run { what, source })?;
        let hint = if self.root { "" } else { HINT_USER };
        if status.success() { Ok(()) } else { Err(Error::Step { what, hint }) }
    }
}

impl Drop for Builder<'_> {
    fn drop(&mut self) {
        // After a failure files of the sub-uids are left, which only the namespace can remove.
        if !self.root {
            let left =
                [self.work.path().join("root"), self.work.path().join("out"), self.work.path().join("tmp")];
            let left = left.each_ref().map(PathBuf::as_path);
            _ = self.step("remove the root file system", &mut self.inside(&remove_script(&left)));
        }
    }
}

fn make_open(folder: &Path) -> Result<(), Error> {
    let write = |source| Error::Write { path: folder.display().to_string(), source };
    fs::create_dir(folder).map_err(write)?;
    // Sub-uids write here; the folder above has a random name and is gone after the build.
    chmod(folder, 0o1777)
}

fn chmod(path: &Path, mode: u32) -> Result<(), Error> {
    let write = |source| Error::Write { path: path.display().to_string(), source };
    fs::set_permissions(path, Permissions::from_mode(mode)).map_err(write)
}

/// Package sources: `$BLIXARD_RIG_MIRROR`, or those of this machine when it has the same Debian release. With
/// none of both `mmdebstrap` uses Debian's own mirrors.
pub fn sources() -> Vec<String> {
    if let Some(mirror) = std::env::var("BLIXARD_RIG_MIRROR").ok().filter(|mirror| !mirror.is_empty()) {
        return vec![mirror];
    }
    let listed =
        fs::read_dir("/etc/apt/sources.list.d").into_iter().flatten().flatten().map(|entry| entry.path());
    std::iter::once(PathBuf::from("/etc/apt/sources.list"))
        .chain(listed)
        .filter(|file| file.extension().is_some_and(|e| e == "list" || e == "sources"))
        .filter(|file| fs::read_to_string(file).is_ok_and(|text| is_debian(&text)))
        .map(|file| file.to_string_lossy().into_owned())
        .collect()
}

/// Whether a list of package sources is Debian's of our release: its suite and its component `main`, as words.
fn is_debian(text: &str) -> bool {
    let words =
        || text.lines().filter(|line| !line.trim_start().starts_with('#')).flat_map(str::split_whitespace);
    words().any(|word| word == recipe::SUITE) && words().any(|word| word == "main")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_debian_of_the_right_release_is_a_source() {
        assert!(is_debian(
            "Types: deb\nURIs: http://deb.debian.org/debian\nSuites: bookworm\nComponents: main\n"
        ));
        assert!(is_debian("deb http://deb.debian.org/debian bookworm main\n"));
        assert!(!is_debian("# deb http://deb.debian.org/debian bookworm main\n"));
        assert!(!is_debian("deb https://packages.example.com/apt cloud-sdk-bookworm main\n"));
        assert!(!is_debian("deb http://archive.ubuntu.com/ubuntu noble main\n"));
    }
}
