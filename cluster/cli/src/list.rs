//! `ps` and `inspect`.

use std::time::{SystemTime, UNIX_EPOCH};

use blixard_api::health::HealthState;
use blixard_api::vm::{Phase, VmView};
use blixard_api::watch::Change;
use serde_json::json;

use crate::Context;
use crate::args::{Format, Ps};
use crate::error::CliError;
use crate::image;
use crate::output::Table;
use crate::units::{show_age, show_bytes};

const HEAD: [&str; 9] = ["NAME", "ID", "IMAGE", "PHASE", "NODE", "ADDRESS", "VCPUS", "MEMORY", "AGE"];
const WIDE: [&str; 13] = [
    "NAME", "ID", "IMAGE", "PHASE", "NODE", "ADDRESS", "VCPUS", "MEMORY", "AGE", "USED", "DISK", "KERNEL",
    "REASON",
];
/// Characters of an id that a table shows: its time and the first random ones. The API takes them as the id.
const SHORT_ID: usize = 13;

/// `ps`: lists VMs, and with `-w` each change after that.
pub async fn ps(context: &Context, options: &Ps) -> Result<u8, CliError> {
    let labels: Vec<String> = options.label.iter().map(|(k, v)| format!("{k}={v}")).collect();
    let page = context.client.list_vms(&context.project, &labels).await?;
    let shown = |view: &VmView| options.all || view.phase != Phase::Stopped;
    let views: Vec<VmView> = page.items.into_iter().filter(shown).collect();
    let output = context.output;
    if options.watch && output.structured() {
        for view in &views {
            output.event(view)?;
        }
    } else if output.structured() {
        output.value(&views)?;
    } else if output.quiet || output.format == Format::Name {
        for view in &views {
            output.line(&name_or_id(context, view))?;
        }
    } else {
        output.text(&table(&views, output.format, now_ms()))?;
    }
    if options.watch {
        watch(context, page.revision, options).await?;
    }
    Ok(0)
}

async fn watch(context: &Context, revision: u64, options: &Ps) -> Result<(), CliError> {
    let output = context.output;
    let mut changes = context.client.watch(revision);
    loop {
        let event = changes.next().await?;
        match event.change {
            Change::Vm(view) if view.project == context.project && has_labels(&view, &options.label) => {
                if output.structured() {
                    output.event(&view)?;
                } else if output.quiet || output.format == Format::Name {
                    output.line(&name_or_id(context, &view))?;
                } else {
                    let text = table(&[*view], output.format, now_ms());
                    output.text(text.split_once('\n').map_or("", |(_, row)| row))?;
                }
            }
            Change::VmGone { project, name, id } if project == context.project => {
                if output.structured() {
                    output.event(&json!({ "gone": { "project": project, "name": name, "id": id } }))?;
                } else if !output.quiet && output.format != Format::Name {
                    output.line(&format!("{name} gone"))?;
                }
            }
            _ => {}
        }
    }
}

fn has_labels(view: &VmView, labels: &[(String, String)]) -> bool {
    labels.iter().all(|(k, v)| view.spec.labels.get(k) == Some(v))
}

fn name_or_id(context: &Context, view: &VmView) -> String {
    if context.output.format == Format::Name { view.name.clone() } else { view.id.to_string() }
}

/// The rows of `ps` at a moment.
fn table(views: &[VmView], format: Format, now_ms: u64) -> String {
    let wide = format == Format::Wide;
    let mut table = if wide { Table::new(&WIDE) } else { Table::new(&HEAD) };
    for view in views {
        let id = view.id.to_string();
        let addresses = view.addresses.iter().map(ToString::to_string);
        let mut row = vec![
            view.name.clone(),
            if wide { id } else { id.chars().take(SHORT_ID).collect() },
            view.spec.image.clone(),
            status(view),
            view.node.clone().unwrap_or_default(),
            if wide { addresses.collect::<Vec<_>>().join(",") } else { addresses.take(1).collect() },
            view.spec.vcpus.to_string(),
            show_bytes(u64::from(view.spec.memory_mib) << 20),
            show_age(now_ms.saturating_sub(view.created_at_ms)),
        ];
        if wide {
            row.push(view.memory_bytes.map(show_bytes).unwrap_or_default());
            row.push(show_bytes(view.spec.disk_mib.saturating_mul(1 << 20)));
            row.push(view.spec.kernel.clone().unwrap_or_else(|| "default".into()));
            row.push(view.reason.clone().unwrap_or_default());
        }
        table.row(row);
    }
    table.render()
}

/// Phase, and health when there is a check (as docker shows it).
fn status(view: &VmView) -> String {
    match view.health.as_ref().map(|health| health.state) {
        None => view.phase.to_string(),
        Some(HealthState::Starting) => format!("{} (health: starting)", view.phase),
        Some(state) => format!("{} ({state})", view.phase),
    }
}

/// `inspect`: everything about VMs, as an array.
pub async fn inspect(context: &Context, names: &[String]) -> Result<u8, CliError> {
    let get = async |name: String| Ok(context.client.vm(&context.project, &name).await?);
    image::inspect(context, names, get).await
}

/// Now, in milliseconds of Unix time.
pub fn now_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    pub fn view(name: &str) -> VmView {
        serde_json::from_value(json!({
            "id": "01ARZ3NDEKTSV4RRFFQ69G5FAV", "name": name, "project": "default",
            "spec": { "image": "busybox" }, "generation": 1, "created_at_ms": 1_000_000, "desired": "running",
            "phase": "running", "node": "n1", "epoch": 1, "start": 1, "image_digest": "sha256:00",
            "addresses": ["10.88.0.2", "fd00::2"], "memory_bytes": 50_000_000, "reason": "fine"
        }))
        .unwrap()
    }

    #[test]
    fn the_table_shows_what_a_user_looks_for_first() {
        assert_eq!(
            table(&[view("web")], Format::Table, 1_090_000),
            "NAME   ID              IMAGE     PHASE     NODE   ADDRESS     VCPUS   MEMORY    AGE\n\
             web    01ARZ3NDEKTSV   busybox   running   n1     10.88.0.2   1       256 MiB   90s\n"
        );
    }

    #[test]
    fn the_phase_has_its_health_beside_it() {
        let mut vm = view("web");
        for (health, shown) in [
            ("healthy", "running (healthy)"),
            ("unhealthy", "running (unhealthy)"),
            ("starting", "running (health: starting)"),
        ] {
            vm.health = Some(serde_json::from_value(json!({ "state": health })).unwrap());
            assert_eq!(status(&vm), shown);
        }
    }

    #[test]
    fn the_wide_table_shows_all_addresses_and_the_reason() {
        let text = table(&[view("web")], Format::Wide, 1_090_000);
        for part in ["01ARZ3NDEKTSV4RRFFQ69G5FAV", "10.88.0.2,fd00::2", "47.6 MiB", "1 GiB", "fine"] {
            assert!(text.contains(part), "{part}: {text}");
        }
    }

    #[test]
    fn a_vm_has_the_labels_that_are_asked_for_or_is_not_shown() {
        let mut vm = view("web");
        vm.spec.labels.insert("a".into(), "b".into());
        assert!(has_labels(&vm, &[]) && has_labels(&vm, &[("a".into(), "b".into())]));
        assert!(!has_labels(&vm, &[("a".into(), "c".into())]));
    }
}
