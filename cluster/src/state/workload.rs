//! What a VM runs, and how it is found out whether that does its work: the words of its image and of its spec, merged as
//! docker does.

use blixard_api::health::{HealthSpec, INTERVAL_MS_DEFAULT, RETRIES_DEFAULT, TIMEOUT_MS_DEFAULT};
use blixard_api::image::ImageConfig;
use blixard_api::vm::VmSpec;
use blixard_vmm_api::guest::Command as Workload;
use blixard_vmm_api::health::HealthCheck;

/// The program with its surroundings; `None` when neither names one (the guest then runs a shell on its console).
///
/// The image's command is the arguments of the image's entry point only: a spec that replaces the entry point does not
/// inherit it. The environment of the spec is added to the image's, entry by entry.
pub fn effective(image: &ImageConfig, spec: &VmSpec) -> Option<Workload> {
    let inherited = if spec.entrypoint.is_none() { image.command.as_slice() } else { &[] };
    let entrypoint = spec.entrypoint.as_ref().unwrap_or(&image.entrypoint);
    let arguments = spec.command.as_deref().unwrap_or(inherited);
    let args: Vec<String> = entrypoint.iter().chain(arguments).cloned().collect();
    (!args.is_empty()).then(|| surrounded(args, image, spec))
}

/// The health check; `None` when neither names one, or the spec wants none. User, directory and environment are those of the
/// workload.
pub fn health(image: &ImageConfig, spec: &VmSpec) -> Option<HealthCheck> {
    let none = HealthSpec::default();
    let (ours, theirs) = (spec.health.as_ref().unwrap_or(&none), image.health.as_ref().unwrap_or(&none));
    let args = ours.command.as_ref().or(theirs.command.as_ref()).filter(|args| !args.is_empty())?;
    Some(HealthCheck {
        command: surrounded(args.clone(), image, spec),
        interval_ms: ours.interval_ms.or(theirs.interval_ms).unwrap_or(INTERVAL_MS_DEFAULT),
        timeout_ms: ours.timeout_ms.or(theirs.timeout_ms).unwrap_or(TIMEOUT_MS_DEFAULT),
        retries: ours.retries.or(theirs.retries).unwrap_or(RETRIES_DEFAULT),
        start_period_ms: ours.start_period_ms.or(theirs.start_period_ms).unwrap_or(0),
    })
}

fn surrounded(args: Vec<String>, image: &ImageConfig, spec: &VmSpec) -> Workload {
    let mut env = image.env.clone();
    env.extend(spec.env.iter().map(|(k, v)| (k.clone(), v.clone())));
    let or = |ours: &Option<String>, theirs: &String| ours.clone().unwrap_or_else(|| theirs.clone());
    Workload { args, env, cwd: or(&spec.cwd, &image.cwd), user: or(&spec.user, &image.user) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(json: &str) -> VmSpec {
        serde_json::from_str(json).unwrap()
    }

    fn image() -> ImageConfig {
        ImageConfig {
            entrypoint: vec!["/entry".into()],
            command: vec!["default".into()],
            env: [("A".into(), "image".into()), ("B".into(), "image".into())].into(),
            cwd: "/srv".into(),
            user: "web".into(),
            ..ImageConfig::default()
        }
    }

    #[test]
    fn an_image_runs_as_it_says_when_the_spec_says_nothing() {
        let run = effective(&image(), &spec(r#"{"image":"a"}"#)).unwrap();
        assert_eq!(run.args, ["/entry", "default"]);
        assert_eq!((run.cwd.as_str(), run.user.as_str()), ("/srv", "web"));
    }

    #[test]
    fn a_command_replaces_the_arguments_and_an_entry_point_replaces_both() {
        let run = |json| effective(&image(), &spec(json)).unwrap().args;
        assert_eq!(run(r#"{"image":"a","command":["x"]}"#), ["/entry", "x"]);
        assert_eq!(run(r#"{"image":"a","entrypoint":["/bin/sh"]}"#), ["/bin/sh"]);
        assert_eq!(
            run(r#"{"image":"a","entrypoint":["/bin/sh"],"command":["-c","id"]}"#),
            ["/bin/sh", "-c", "id"]
        );
        assert_eq!(run(r#"{"image":"a","entrypoint":[],"command":["ls"]}"#), ["ls"]);
    }

    #[test]
    fn the_environment_is_merged_entry_by_entry() {
        let run =
            effective(&image(), &spec(r#"{"image":"a","env":{"B":"spec","C":"spec"},"cwd":"/"}"#)).unwrap();
        let env: Vec<_> = run.env.iter().map(|(k, v)| format!("{k}={v}")).collect();
        assert_eq!(env, ["A=image", "B=spec", "C=spec"]);
        assert_eq!(run.cwd, "/");
    }

    #[test]
    fn a_health_check_is_the_images_with_what_the_spec_says_in_its_place() {
        let mut image = image();
        let check = |image: &ImageConfig, json| health(image, &spec(json));
        assert_eq!(check(&image, r#"{"image":"a","health":{"retries":2}}"#), None, "nobody names a command");
        let own = check(&image, r#"{"image":"a","env":{"C":"c"},"health":{"command":["ok"]}}"#).unwrap();
        assert_eq!(
            (own.interval_ms, own.timeout_ms, own.retries, own.start_period_ms),
            (30_000, 30_000, 3, 0)
        );
        assert_eq!((own.command.user.as_str(), own.command.env.len()), ("web", 3));
        let brought = HealthSpec {
            command: Some(vec!["look".into()]),
            interval_ms: Some(5_000),
            start_period_ms: Some(7),
            ..HealthSpec::default()
        };
        image.health = Some(brought);
        let mixed = check(&image, r#"{"image":"a","health":{"interval_ms":900,"retries":1}}"#).unwrap();
        assert_eq!(mixed.command.args, ["look"]);
        assert_eq!((mixed.interval_ms, mixed.retries, mixed.start_period_ms), (900, 1, 7));
        assert_eq!(check(&image, r#"{"image":"a","health":{"command":[]}}"#), None);
    }

    #[test]
    fn nothing_to_run_means_a_shell_on_the_console() {
        assert_eq!(effective(&ImageConfig::default(), &spec(r#"{"image":"a","env":{"A":"b"}}"#)), None);
    }
}
