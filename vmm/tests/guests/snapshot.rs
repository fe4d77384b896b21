//! Snapshots, restores and forks of whole VMs: a guest goes on where it was, loses nothing and repeats nothing; what is no
//! proper snapshot is refused with the section and the reason.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;

use blixard_vmm::snapshot::file::crc32c;
use blixard_vmm_api::config::ConsoleConfig;
use blixard_vmm_api::control::{Phase, Reply, Request};
use blixard_vmm_api::snapshot::{RestoreConfig, SnapshotFiles, SnapshotKind, SnapshotMade};
use tempfile::TempDir;

use crate::code;
use crate::vm::{Control, Ended, Vm, possible};
use crate::{config, open, start_by_descriptors};

/// State and memory file of a snapshot.
pub struct Snapshot {
    directory: TempDir,
}

impl Snapshot {
    pub fn take(control: &Control, kind: SnapshotKind) -> (Self, SnapshotMade) {
        let snapshot = Self { directory: tempfile::tempdir().unwrap() };
        let [state, memory] = ["state", "memory"].map(|name| {
            let path = snapshot.directory.path().join(name);
            File::options().read(true).write(true).create(true).truncate(true).open(path).unwrap()
        });
        let beside = [state.as_raw_fd(), memory.as_raw_fd()];
        match control.ask_with(&Request::Snapshot(kind), &beside) {
            (Reply::Snapshot(made), _) => (snapshot, made),
            (other, _) => panic!("{other:?} instead of a snapshot"),
        }
    }

    pub fn path(&self, name: &str) -> String {
        self.directory.path().join(name).to_str().unwrap().to_owned()
    }

    fn files(&self) -> String {
        format!("{},{}", self.path("state"), self.path("memory"))
    }
}

fn restore(snapshot: &Snapshot, bases: &[&Snapshot], more: &[&str]) -> Vm {
    let bases = bases.iter().flat_map(|base| ["--base".to_owned(), base.files()]);
    let words: Vec<String> = bases
        .chain(["--restore".into(), snapshot.files(), "--control".into(), "DIR/control".into()])
        .collect();
    let words: Vec<&str> = words.iter().map(String::as_str).chain(more.iter().copied()).collect();
    Vm::run_without_kernel(&words)
}

/// A VM that prints letters and has printed at least a hundred.
fn letters(more: &[&str]) -> Vm {
    // As large as real kernels, so that it is mapped.
    let kernel = code::prints_letters().elf_of(300_000);
    let vm = Vm::run_file(&kernel, &[&["--control", "DIR/control"], more].concat());
    hundred(&vm);
    vm
}

/// Waits for a hundred letters, so that each of the guest's pages was read and written.
pub fn hundred(vm: &Vm) {
    (0..4).for_each(|_| vm.wait_for(b'Z'));
}

pub fn kill(vm: Vm) -> Ended {
    vm.control().send(&serde_json::to_vec(&Request::Kill).unwrap());
    let end = vm.end();
    assert_eq!((end.code, end.problems.as_str()), (Some(7), ""));
    end
}

/// The letter behind `text`, whose letters have to follow each other, from `first` on if it is given.
#[track_caller]
fn next(text: &str, first: Option<u8>) -> u8 {
    let mut expected = first.unwrap_or(b'A');
    for letter in text.bytes() {
        assert_eq!(char::from(letter), char::from(expected), "in {text}");
        expected = if letter == b'Z' { b'A' } else { letter + 1 };
    }
    expected
}

#[test]
fn a_guest_goes_on_where_its_full_snapshot_was_made() {
    if possible() {
        for more in [&[] as &[&str], &["--merge"], &["--fork-ready"], &["--thp", "--track-writes"]] {
            let vm = letters(more);
            let control = vm.control();
            assert_eq!(control.ask(&Request::Pause), Reply::Done);
            let (snapshot, made) = Snapshot::take(&control, SnapshotKind::Full);
            // 64 pages of counters, a few of the start; a file of 128 MiB would be nonsense.
            assert!((64 * 4096..2 << 20).contains(&made.memory_bytes), "{made:?}");
            assert_eq!((made.pause_us, control.status().phase), (None, Phase::Paused));
            let behind = next(&kill(vm).output, None);
            for _ in 0..2 {
                let again = restore(&snapshot, &[], &[]);
                hundred(&again);
                next(&kill(again).output, Some(behind));
            }
        }
    }
}

#[test]
fn a_running_vm_goes_on_after_its_snapshot_and_tells_how_long_it_stood_still() {
    if possible() {
        let vm = letters(&["--vcpus", "2"]);
        let (snapshot, made) = Snapshot::take(&vm.control(), SnapshotKind::Full);
        assert!(made.pause_us.is_some_and(|pause| pause > 0));
        hundred(&vm);
        next(&kill(vm).output, None);
        let again = restore(&snapshot, &[], &[]);
        hundred(&again);
        let output = kill(again).output;
        next(&output, output.bytes().next());
    }
}

#[test]
fn a_snapshot_of_a_restored_vm_and_its_diffs_are_whole() {
    if possible() {
        let vm = letters(&["--track-writes"]);
        let control = vm.control();
        let (full, made_full) = Snapshot::take(&control, SnapshotKind::Full);
        hundred(&vm);
        let (first, made_first) = Snapshot::take(&control, SnapshotKind::Diff);
        assert_eq!(made_first.parent.as_ref(), Some(&made_full.id));
        hundred(&vm);
        control.ask(&Request::Pause);
        let (second, made) = Snapshot::take(&control, SnapshotKind::Diff);
        assert_eq!(made.parent, Some(made_first.id));
        assert!(made.memory_bytes < made_full.memory_bytes);
        let behind = next(&kill(vm).output, None);

        let again = restore(&second, &[&full, &first], &[]);
        hundred(&again);
        let control = again.control();
        control.ask(&Request::Pause);
        let (third, _) = Snapshot::take(&control, SnapshotKind::Diff);
        let (whole, _) = Snapshot::take(&control, SnapshotKind::Full);
        let behind = next(&kill(again).output, Some(behind));
        for vm in [restore(&third, &[&full, &first, &second], &[]), restore(&whole, &[], &[])] {
            hundred(&vm);
            next(&kill(vm).output, Some(behind));
        }
        for wrong in [&[] as &[&Snapshot], &[&full], &[&first], &[&first, &full]] {
            let end = restore(&second, wrong, &[]).end();
            assert_eq!((end.code, end.problems.contains("is based on")), (Some(2), true), "{end:?}");
        }
    }
}

#[test]
fn a_diff_without_tracking_or_without_a_snapshot_before_it_is_refused() {
    if possible() {
        for (more, reason) in [("--no-stdin", "not tracked"), ("--track-writes", "no snapshot yet")] {
            let vm = letters(&[more]);
            let files = [tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap()];
            let beside = [files[0].as_raw_fd(), files[1].as_raw_fd()];
            let (reply, _) = vm.control().ask_with(&Request::Snapshot(SnapshotKind::Diff), &beside);
            assert!(matches!(&reply, Reply::Refused { reason: r } if r.contains(reason)), "{reply:?}");
            for beside in [&[] as &[i32], &beside[..1]] {
                let (reply, _) = vm.control().ask_with(&Request::Snapshot(SnapshotKind::Full), beside);
                assert!(matches!(&reply, Reply::Refused { reason } if reason.contains("two descriptors")));
            }
            hundred(&vm);
            next(&kill(vm).output, None);
        }
    }
}

/// A child of a fork: state and memory of the fork come first, then those of what it is based on.
fn child(files: &[OwnedFd], vcpus: u8, memory_mib: u32) -> Vm {
    let mut config = config();
    (config.vcpus, config.memory_mib, config.rng, config.kernel) = (vcpus, memory_mib, false, String::new());
    config.console = ConsoleConfig { stdio: true, ..ConsoleConfig::default() };
    config.control = Some("control".into());
    let name = |number: usize| SnapshotFiles { state: format!("s{number}"), memory: format!("m{number}") };
    let pairs = files.len() / 2;
    config.restore = Some(RestoreConfig {
        snapshot: name(0),
        bases: (1..pairs).rev().map(name).collect(),
        paging: Default::default(),
        userfaultfd: None,
        working_set: None,
        clock_went_on: false,
        paused: false,
    });
    let names: Vec<String> = (0..pairs).flat_map(|n| [format!("s{n}"), format!("m{n}")]).collect();
    let copies = files.iter().map(|file| file.try_clone().unwrap());
    let mut given: Vec<(&str, OwnedFd)> = names.iter().map(String::as_str).zip(copies).collect();
    given.push(("kvm", open("/dev/kvm")));
    start_by_descriptors(config, given, Some("control"))
}

fn fork(control: &Control) -> Vec<OwnedFd> {
    match control.ask_with(&Request::Fork, &[]) {
        (Reply::Forked(_), files) => files,
        (other, _) => panic!("{other:?} instead of a fork"),
    }
}

#[test]
fn children_and_parent_go_on_from_the_same_letter_and_diverge() {
    for more in [&[] as &[&str], &["--fork-ready"], &["--merge", "--track-writes"]] {
        if !possible() {
            return;
        }
        let parent = letters(&[&["--memory", "64"], more].concat());
        let control = parent.control();
        control.ask(&Request::Pause);
        let files = fork(&control);
        assert_eq!(files.len(), 2);
        let children: Vec<Vm> = (0..3).map(|_| child(&files, 1, 64)).collect();
        children.iter().for_each(hundred);
        control.ask(&Request::Resume);
        hundred(&parent);
        // A second fork is based on the first one; and so is a fork of a child.
        control.ask(&Request::Pause);
        let second = fork(&control);
        let later = child(&second, 1, 64);
        let in_child = children[0].control();
        in_child.ask(&Request::Pause);
        let third = fork(&in_child);
        assert_eq!((second.len(), third.len()), (4, 4));
        let grandchild = child(&third, 1, 64);
        hundred(&later);
        hundred(&grandchild);
        let behind_second = next(&kill(parent).output, None);
        next(&kill(later).output, Some(behind_second));
        let mut outputs = children.into_iter().map(|child| kill(child).output);
        let first = outputs.next().unwrap();
        let start = first.bytes().next();
        let behind_third = next(&first, start);
        outputs.for_each(|output| assert_eq!((next(&output, start), output.bytes().next()).1, start));
        next(&kill(grandchild).output, Some(behind_third));
    }
}

#[test]
fn a_timer_goes_on_after_a_restore() {
    if possible() {
        let vm = Vm::run(code::ticks(), &["--control", "DIR/control"]);
        (0..3).for_each(|_| vm.wait_for(b't'));
        let (snapshot, _) = Snapshot::take(&vm.control(), SnapshotKind::Full);
        (0..3).for_each(|_| vm.wait_for(b't'));
        kill(vm);
        let again = restore(&snapshot, &[], &[]);
        (0..5).for_each(|_| again.wait_for(b't'));
        assert!(kill(again).output.bytes().all(|byte| byte == b't'));
    }
}

#[test]
fn a_vm_that_is_restored_paused_waits_for_its_resume() {
    if possible() {
        let vm = letters(&[]);
        let (snapshot, _) = Snapshot::take(&vm.control(), SnapshotKind::Full);
        kill(vm);
        let again = restore(&snapshot, &[], &["--paused"]);
        let control = again.control();
        assert_eq!((control.status().phase, control.printed()), (Phase::Paused, 0));
        control.ask(&Request::Resume);
        hundred(&again);
        kill(again);
    }
}

#[test]
fn pages_come_by_faults_and_a_recorded_working_set_comes_first() {
    if possible() && File::options().read(true).write(true).open("/dev/userfaultfd").is_ok() {
        let vm = letters(&["--memory", "256"]);
        vm.control().ask(&Request::Pause);
        let (snapshot, _) = Snapshot::take(&vm.control(), SnapshotKind::Full);
        let behind = next(&kill(vm).output, None);
        let again = restore(&snapshot, &[], &["--userfault"]);
        hundred(&again);
        let set = File::create_new(snapshot.path("set")).unwrap();
        assert_eq!(again.control().ask_with(&Request::WorkingSet, &[set.as_raw_fd()]).0, Reply::Done);
        next(&kill(again).output, Some(behind));
        // The counters and the code: that is what the guest used.
        assert!((24..2048).contains(&set.metadata().unwrap().len()));
        for more in [&["--userfault"] as &[&str], &[]] {
            let set = snapshot.path("set");
            let again = restore(&snapshot, &[], &[&["--working-set", set.as_str()], more].concat());
            hundred(&again);
            let (whole, _) = Snapshot::take(&again.control(), SnapshotKind::Full);
            next(&kill(again).output, Some(behind));
            let last = restore(&whole, &[], &[]);
            hundred(&last);
            kill(last);
        }
    }
}

#[test]
fn a_guest_whose_clock_lies_in_its_memory_goes_on_by_faults() {
    if possible() && File::options().read(true).write(true).open("/dev/userfaultfd").is_ok() {
        let vm = Vm::run_file(&code::has_a_clock().elf_of(300_000), &["--control", "DIR/control"]);
        hundred(&vm);
        let (snapshot, _) = Snapshot::take(&vm.control(), SnapshotKind::Full);
        kill(vm);
        let again = restore(&snapshot, &[], &["--userfault"]);
        hundred(&again);
        kill(again);
    }
}

/// Sections of a state file: name, place of the content, its length.
pub fn sections(state: &[u8]) -> Vec<(String, usize, usize)> {
    let (mut at, mut found) = (24, vec![]);
    while at < state.len() {
        let (name, length) =
            (usize::from(state[at]), u32::from_le_bytes(state[at + 4..at + 8].try_into().unwrap()));
        let content = at + 8 + name;
        found.push((String::from_utf8(state[at + 8..content].to_vec()).unwrap(), content, length as usize));
        at = content + length as usize + 4;
    }
    found
}

/// Makes the checksum of the section with its content at `content` right again.
pub fn seal(state: &mut [u8], name: &str, content: usize, length: usize) {
    let crc = crc32c(0, &state[content - name.len() - 8..content + length]);
    state[content + length..content + length + 4].copy_from_slice(&crc.to_le_bytes());
}

/// How the restore of a snapshot with this state is refused; none when it is not.
pub fn refusal(snapshot: &Snapshot, state: &[u8]) -> Option<Ended> {
    std::fs::write(snapshot.path("state"), state).unwrap();
    let vm = restore(snapshot, &[], &["--rng", "--paused"]);
    if let Some(control) = vm.try_control() {
        // It may end before it is asked to.
        let _ = control.try_ask(&Request::Kill);
    }
    let end = vm.end();
    assert!(matches!(end.code, Some(2 | 3 | 7)), "{end:?}");
    assert!(!end.problems.contains("panicked"), "{end:?}");
    assert_eq!(end.output, "", "a refused guest ran");
    (end.code != Some(7)).then_some(end)
}

#[test]
fn a_hostile_snapshot_is_refused_by_section_or_harmless_and_never_a_panic() {
    if possible() {
        let vm = Vm::run(code::prints_letters(), &["--control", "DIR/control", "--rng", "--memory", "16"]);
        hundred(&vm);
        let (snapshot, _) = Snapshot::take(&vm.control(), SnapshotKind::Full);
        kill(vm);
        let state = std::fs::read(snapshot.path("state")).unwrap();
        let refused = |state: &[u8], reason: &str| {
            let end = refusal(&snapshot, state).expect(reason);
            assert!(end.problems.contains(reason), "{reason}: {end:?}");
        };
        refused(&[], "header: too short");
        refused(&state[..state.len() - 1], "header: tells");
        let mut newer = state.clone();
        newer[8] = 2;
        refused(&newer, "header: version 2");
        let mut noticed = std::collections::BTreeSet::new();
        for (name, content, length) in sections(&state) {
            let mut damaged = state.clone();
            damaged[content + length / 2] ^= 1;
            refused(&damaged, &format!("section {name}: checksum"));
            // With the right checksum the content itself is looked at: first, middle, last, and some between.
            for place in [0, 1, length / 3, length / 2, length - 1] {
                let mut changed = state.clone();
                changed[content + place] ^= 0x55;
                seal(&mut changed, &name, content, length);
                // Many changes are the guest's own business. What is refused is refused by its name; but the front end takes
                // the shape of the machine from the snapshot, and refuses what cannot be.
                if let Some(end) = refusal(&snapshot, &changed) {
                    assert!(end.problems.contains(&name) || name == "machine", "{name}+{place}: {end:?}");
                    noticed.insert(name.clone());
                }
            }
        }
        for name in ["machine", "memory", "cpu", "vcpu.0", "dev.rng"] {
            assert!(noticed.contains(name), "no change of {name} was noticed, only of {noticed:?}");
        }
        let short = File::options().write(true).open(snapshot.path("memory")).unwrap();
        short.set_len(1 << 20).unwrap();
        refused(&state, "memory file: 1048576 bytes");
    }
}

#[test]
fn a_vm_of_another_shape_is_refused() {
    if possible() {
        let vm = Vm::run(code::prints_letters(), &["--control", "DIR/control", "--rng"]);
        hundred(&vm);
        let files = fork(&vm.control());
        let end = child(&files, 1, 128).end();
        assert!(end.problems.contains("section machine: device rng is not configured"), "{end:?}");
        let end = child(&files, 2, 128).end();
        assert!(end.problems.contains("section machine: 1 vCPUs, 2 are configured"), "{end:?}");
        let end = child(&files, 1, 64).end();
        assert!(end.problems.contains("bytes of memory"), "{end:?}");
        kill(vm);
    }
}

/// Where the snapshots of all versions are kept.
fn golden(version: u32) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/{version}"))
}

/// Guest memory of a golden snapshot: of each page that is not zero its number, the length without zeros at its end, the bytes.
fn unpack(packed: &[u8], memory: &File) {
    let mut rest = packed;
    while let Some((head, tail)) = rest.split_first_chunk::<6>() {
        let page = u32::from_le_bytes(head[..4].try_into().unwrap());
        let length = usize::from(u16::from_le_bytes([head[4], head[5]]));
        memory.write_all_at(&tail[..length], u64::from(page) * 4096).unwrap();
        rest = &tail[length..];
    }
}

#[test]
fn a_golden_snapshot_of_each_version_goes_on_or_is_of_another_processor() {
    if possible() {
        for version in 1..=blixard_vmm::snapshot::file::VERSION {
            let snapshot = Snapshot { directory: tempfile::tempdir().unwrap() };
            std::fs::copy(golden(version).join("state"), snapshot.path("state")).unwrap();
            let memory = File::create_new(snapshot.path("memory")).unwrap();
            memory.set_len(16 << 20).unwrap();
            unpack(&std::fs::read(golden(version).join("pages")).unwrap(), &memory);
            let vm = restore(&snapshot, &[], &["--rng", "--paused"]);
            // The socket is there before the snapshot is looked at.
            let control = vm.try_control().filter(|control| control.try_ask(&Request::Resume).is_some());
            if control.is_some() {
                hundred(&vm);
                let output = kill(vm).output;
                next(&output, output.bytes().next());
            } else {
                // What belongs to the processor of another host; all other sections were written for ever.
                let end = vm.end();
                let processor = ["section cpu", "section vcpu.0", "section clock"];
                assert!(processor.iter().any(|name| end.problems.contains(name)), "{end:?}");
            }
        }
    }
}

/// Writes the golden snapshot of the present version. To be run once per version.
#[test]
#[ignore = "writes into the source tree"]
fn write_golden() {
    let arguments = ["--control", "DIR/control", "--rng", "--memory", "16"];
    let vm = Vm::run(code::prints_letters(), &arguments);
    hundred(&vm);
    let (snapshot, _) = Snapshot::take(&vm.control(), SnapshotKind::Full);
    kill(vm);
    let place = golden(blixard_vmm::snapshot::file::VERSION);
    std::fs::create_dir_all(&place).unwrap();
    std::fs::copy(snapshot.path("state"), place.join("state")).unwrap();
    let memory = std::fs::read(snapshot.path("memory")).unwrap();
    let mut packed = vec![];
    for (number, page) in (0u32..).zip(memory.chunks(4096)) {
        if let Some(last) = page.iter().rposition(|byte| *byte != 0) {
            packed.extend(number.to_le_bytes());
            packed.extend((last as u16 + 1).to_le_bytes());
            packed.extend(&page[..=last]);
        }
    }
    std::fs::write(place.join("pages"), packed).unwrap();
}
