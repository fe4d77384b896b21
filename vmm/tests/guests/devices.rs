//! Disks, balloon and persistent memory: drivers in guests, and what can be changed while they run.

use std::io::Write;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::FileExt;

use blixard_vmm_api::control::{Reply, Request};

use crate::code;
use crate::vm::{Control, Vm, possible};

fn file(size: u64, beginning: &[u8]) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(beginning).unwrap();
    file.as_file().set_len(size).unwrap();
    file
}

fn path(file: &tempfile::NamedTempFile, mode: &str) -> String {
    format!("{}{mode}", file.path().to_str().unwrap())
}

fn count(control: &Control, name: &str) -> u64 {
    match control.ask(&Request::Stats) {
        Reply::Stats(stats) => *stats.get(name).unwrap_or_else(|| panic!("no {name} in {stats:?}")),
        other => panic!("{other:?} instead of counters"),
    }
}

fn swap(control: &Control, id: &str, backing: &[RawFd]) -> Reply {
    control.ask_with(&Request::SwapDisk { id: id.into() }, backing).0
}

fn refused(reply: Reply) -> String {
    match reply {
        Reply::Refused { reason } => reason,
        other => panic!("{other:?} instead of a refusal"),
    }
}

#[test]
fn a_disk_is_read_swapped_resized_and_written_while_its_guest_runs() {
    if possible() {
        let (first, second) = (file(1 << 20, b"A"), file(2 << 20, b"B"));
        let arguments = ["--control", "DIR/control", "--disk", &path(&first, "")];
        let mut vm = Vm::run(code::drives_a_disk(), &arguments);
        let mut stdin = vm.stdin.take().unwrap();
        let control = vm.control();
        stdin.write_all(b"r").unwrap();
        vm.wait_for(b'A');
        assert_eq!(swap(&control, "disk0", &[second.as_file().as_raw_fd()]), Reply::Done);
        stdin.write_all(b"r").unwrap();
        vm.wait_for(b'B');
        second.as_file().set_len(3 << 20).unwrap();
        assert_eq!(control.ask(&Request::ResizeDisk { id: "disk0".into() }), Reply::Done);
        let resize = |id: &str| control.ask(&Request::ResizeDisk { id: id.into() });
        assert!(refused(resize("other")).contains("no device"));
        assert!(refused(swap(&control, "disk0", &[])).contains("no descriptor"));
        let (socket, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        assert!(refused(swap(&control, "disk0", &[socket.as_raw_fd()])).contains("neither a regular file"));
        assert_eq!(count(&control, "blk.disk0.reads"), 2);
        stdin.write_all(b"q").unwrap();
        let end = vm.end();
        assert_eq!((end.code, end.output.as_str()), (Some(0), "ABD"), "{end:?}");
        let mut byte = [0];
        second.as_file().read_exact_at(&mut byte, 512).unwrap();
        assert_eq!(&byte, b"W");
        first.as_file().read_exact_at(&mut byte, 512).unwrap();
        assert_eq!(byte, [0]);
    }
}

#[test]
fn a_guest_gives_up_a_page_and_finds_it_empty() {
    if possible() {
        for more in [&[] as &[&str], &["--fork-ready"]] {
            let end = Vm::run(code::drives_a_balloon(), &[&["--balloon", "0,oom"], more].concat()).end();
            assert_eq!((end.code, end.output.as_str()), (Some(0), "B"), "{end:?}");
        }
    }
}

#[test]
fn a_balloon_has_another_target_while_its_guest_runs() {
    if possible() {
        let balloon = "7,reporting,hinting,statistics=1";
        let vm = Vm::run(code::prints_for_ever(), &["--control", "DIR/control", "--balloon", balloon]);
        vm.wait_for(b'.');
        let control = vm.control();
        assert_eq!(count(&control, "balloon.target_bytes"), 7 << 20);
        assert_eq!(control.ask(&Request::SetBalloon { mib: 100 }), Reply::Done);
        assert_eq!(count(&control, "balloon.target_bytes"), 100 << 20);
        let refusal = refused(control.ask(&Request::SetBalloon { mib: 128 }));
        assert!(refusal.contains("128 MiB asked for"), "{refusal}");
        assert_eq!(control.ask(&Request::StartHinting), Reply::Done);
        assert_eq!(count(&control, "balloon.hinting"), 1);
        assert_eq!(control.ask(&Request::StopHinting), Reply::Done);
        control.send(&serde_json::to_vec(&Request::Kill).unwrap());
        assert_eq!(vm.end().code, Some(7));
    }
}

#[test]
fn persistent_memory_is_in_the_guest_and_flushed() {
    if possible() {
        for mode in ["", ",ro"] {
            let backing = file(2 << 20, b"p");
            let end = Vm::run(code::flushes_persistent_memory(), &["--pmem", &path(&backing, mode)]).end();
            assert_eq!((end.code, end.output.as_str()), (Some(0), "F"), "{end:?}");
        }
    }
}

#[test]
fn what_a_guest_writes_to_persistent_memory_is_in_the_file_unless_it_is_read_only() {
    if possible() {
        for (mode, output, content) in [("", "pW", b'W'), (",ro", "pp", b'p')] {
            let backing = file(2 << 20, b"p");
            let end = Vm::run(code::writes_persistent_memory(), &["--pmem", &path(&backing, mode)]).end();
            assert_eq!((end.code, end.output.as_str()), (Some(0), output), "{end:?}");
            let mut byte = [0];
            backing.as_file().read_exact_at(&mut byte, 0).unwrap();
            assert_eq!(byte, [content]);
        }
    }
}
