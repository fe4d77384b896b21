//! A kernel as large as real ones, whose segment is mapped from its file.

use crate::code;
use crate::vm::{Ended, Vm, possible};

#[test]
fn a_large_kernel_runs_from_its_file_and_does_not_change_it() {
    if possible() {
        let kernel = code::prints_its_command_line().elf_of(300_000);
        let vm = Vm::run_file(&kernel, &["--cmdline", "mapped"]);
        let path = vm.path("kernel");
        // The directory is gone when the VM is.
        let file = std::fs::File::open(path).unwrap();
        assert_eq!(vm.end(), Ended { code: Some(0), output: "mapped".into(), problems: String::new() });
        let mut after = vec![];
        std::io::Read::read_to_end(&mut &file, &mut after).unwrap();
        assert!(after == kernel, "the kernel's file has changed");
    }
}
