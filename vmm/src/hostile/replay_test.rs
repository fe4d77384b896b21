//! Each target with random bytes, and with what fuzzing once found (`fuzz/regressions/TARGET/`).

use std::fs;
use std::path::Path;

use proptest::prelude::*;

use super::{TARGETS, run};

#[test]
fn what_once_was_found_is_found_no_more() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/regressions");
    for (name, target) in TARGETS {
        let Ok(inputs) = fs::read_dir(root.join(name)) else { continue };
        for input in inputs {
            let path = input.unwrap().path();
            println!("{}", path.display());
            target(&fs::read(path).unwrap());
        }
    }
}

#[test]
fn what_targets_begin_with_is_valid() {
    for mode in [1, 2] {
        run("kernel_load", &[mode]);
    }
    run("config", &[1]);
}

macro_rules! survives {
    ($($test:ident: $target:literal,)*) => {
        proptest! {
            #![proptest_config(ProptestConfig::with_cases(64))]
            $(#[test]
            fn $test(data in proptest::collection::vec(any::<u8>(), 0..3000)) {
                run($target, &data);
            })*
        }
    };
}

survives! {
    a_balloon_survives_any_driver: "balloon",
    a_disk_survives_any_driver: "block",
    any_configuration_is_read_or_refused: "config",
    any_kernel_is_loaded_or_refused: "kernel_load",
    the_control_socket_survives_any_client: "control",
    a_network_card_survives_any_driver: "net",
    the_bus_survives_any_access: "pci",
    persistent_memory_survives_any_driver: "pmem",
    the_entropy_device_survives_any_driver: "rng",
    the_serial_port_survives_any_access: "serial",
    any_section_of_a_state_file_is_read_or_refused: "snapshot",
    any_state_of_a_device_is_taken_or_refused: "transport_state",
    the_vsock_device_survives_any_driver: "vsock",
}
