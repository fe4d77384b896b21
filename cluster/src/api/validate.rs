//! What a VM may be, field by field, all wrong ones at once.

use std::collections::BTreeMap;

use blixard_api::image::ImageConfig;
use blixard_api::vm::VmSpec;
use blixard_api::{Detail, check_name};
use blixard_vmm_api::config::{CMDLINE_MAX, VCPUS_MAX};
use blixard_vmm_api::guest::Command as Workload;

use super::error::detail;
use crate::state::State;
use crate::state::apply::{DEFAULT_KERNEL, DEFAULT_NETWORK, NO_NETWORK};
use crate::state::workload;

/// Least memory in MiB: a stock kernel with its initramfs needs about that much.
pub const MEMORY_MIB_MIN: u32 = 32;
/// Smallest and largest disk in MiB.
pub const DISK_MIB: (u64, u64) = (16, 16 << 20);
/// Most labels.
const LABELS_MAX: usize = 64;
/// Longest key or value of a label in characters.
const LABEL_CHARS_MAX: usize = 128;
/// Longest words that the user may add to the kernel's command line: ours need the rest.
const CMDLINE_USER_MAX: usize = CMDLINE_MAX / 2;
/// Longest path (`PATH_MAX` of Linux, with its NUL).
const PATH_MAX: usize = 4095;
/// Longest `user:group`.
const USER_MAX: usize = 128;

/// Checks the path and the name of a new VM.
pub fn names(project: &str, name: Option<&str>, found: &mut Vec<Detail>) {
    for (field, text) in [("project", Some(project)), ("name", name)] {
        if let Some(Err(form)) = text.map(|text| check_name(text, false)) {
            found.push(detail(field, "bad_format", form));
        }
    }
}

/// Checks a spec against what is possible and what is there. `without` are fields that are known to be wrong already.
pub fn spec(state: &State, spec: &VmSpec, without: &[String], found: &mut Vec<Detail>) {
    let mut wrong = |field: &str, code: &str, message: String| {
        let field = format!("spec.{field}");
        if !without.contains(&field) {
            found.push(detail(field, code, message));
        }
    };
    if !(1..=VCPUS_MAX).contains(&spec.vcpus) {
        wrong("vcpus", "out_of_range", format!("{} asked for, 1 to {VCPUS_MAX} are possible", spec.vcpus));
    }
    if spec.memory_mib < MEMORY_MIB_MIN {
        let text = format!("{} MiB asked for, at least {MEMORY_MIB_MIN} are needed", spec.memory_mib);
        wrong("memory_mib", "out_of_range", text);
    }
    let (least, most) = DISK_MIB;
    if !(least..=most).contains(&spec.disk_mib) {
        let text = format!("{} MiB asked for, {least} to {most} are possible", spec.disk_mib);
        wrong("disk_mib", "out_of_range", text);
    }
    let image = state.image(&spec.image);
    if image.is_none() {
        wrong("image", "not_found", format!("there is no image {:?}", spec.image));
    }
    let kernel = spec.kernel.as_deref().unwrap_or(DEFAULT_KERNEL);
    if kernel != DEFAULT_KERNEL && state.kernel(kernel).is_none() {
        wrong("kernel", "not_found", format!("there is no kernel {kernel:?}"));
    }
    let network = spec.network.as_deref().unwrap_or(DEFAULT_NETWORK);
    if network != NO_NETWORK && state.network(network).is_none() {
        let known: Vec<&str> = state.networks().map(|n| n.name.as_str()).collect();
        wrong(
            "network",
            "not_found",
            format!("there is no network {network:?}, but {}, none", known.join(", ")),
        );
    }
    if spec.cmdline.len() > CMDLINE_USER_MAX || !spec.cmdline.bytes().all(|b| (0x20..0x7f).contains(&b)) {
        let form = format!("at most {CMDLINE_USER_MAX} printable ASCII characters are possible");
        wrong("cmdline", "bad_format", form);
    }
    let absolute = |cwd: &String| cwd.is_empty() || (cwd.starts_with('/') && cwd.len() <= PATH_MAX);
    if !spec.cwd.as_ref().is_none_or(absolute) {
        wrong("cwd", "bad_format", format!("an absolute path of at most {PATH_MAX} bytes is needed"));
    }
    if spec.user.as_ref().is_some_and(|user| user.len() > USER_MAX || user.contains(char::is_whitespace)) {
        wrong("user", "bad_format", format!("user or user:group of at most {USER_MAX} characters is needed"));
    }
    let config = image.map(|image| image.config.clone()).unwrap_or_default();
    // Without a program the guest runs a shell of its own; the rest is looked at all the same.
    let shell = || Workload { args: vec!["sh".into()], env: spec.env.clone(), ..Workload::default() };
    let workload = workload::effective(&config, spec).unwrap_or_else(shell);
    if let Err(error) = workload.validate("command") {
        let field = if error.field == "command.env" { "env" } else { "command" };
        wrong(field, "bad_format", error.problem);
    }
    health(&config, spec, &mut wrong);
    labels(&spec.labels, &mut wrong);
    super::placement::check(spec, &mut wrong);
}

fn health(image: &ImageConfig, spec: &VmSpec, wrong: &mut impl FnMut(&str, &str, String)) {
    let wanted = spec.health.as_ref();
    match workload::health(image, spec) {
        Some(check) => {
            if let Err(error) = check.validate("health") {
                // User, directory and environment are the workload's, and wrong there already.
                let field =
                    if error.field.starts_with("health.command") { "health.command" } else { &error.field };
                wrong(field, "out_of_range", error.problem);
            }
        }
        None if wanted.is_some_and(|health| health.command.is_none()) => {
            wrong("health.command", "missing", "the image brings no health check".into());
        }
        None => {}
    }
}

fn labels(labels: &BTreeMap<String, String>, wrong: &mut impl FnMut(&str, &str, String)) {
    if labels.len() > LABELS_MAX {
        wrong(
            "labels",
            "out_of_range",
            format!("{} labels, at most {LABELS_MAX} are possible", labels.len()),
        );
    }
    let good = |text: &str| text.chars().count() <= LABEL_CHARS_MAX && !text.contains(char::is_control);
    if labels.iter().any(|(key, value)| key.is_empty() || !good(key) || !good(value)) {
        let form =
            format!("keys have 1 to {LABEL_CHARS_MAX} characters, values at most as many, none is a control");
        wrong("labels", "bad_format", form);
    }
}
