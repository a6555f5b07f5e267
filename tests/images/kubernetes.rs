//! deploy/kubernetes.yaml: the published schema, Pod Security "restricted", and that its parts fit each other.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};

use crate::docker::{ROOT, tool};
use crate::support::process::{self, Output};
use crate::support::{temporary_folder, warmdock};

fn file() -> std::path::PathBuf {
    Path::new(ROOT).join("deploy/kubernetes.yaml")
}

/// The documents of the file. YAML is read by what validates it as well.
fn documents() -> Vec<Value> {
    let mut command = Command::new(tool("python"));
    command.args([
        "-c",
        "import json, sys, yaml; print(json.dumps(list(yaml.safe_load_all(sys.stdin))))",
    ]);
    let text = std::fs::read(file()).unwrap();
    let output = process::run(command, &text, Duration::from_secs(30)).ok();
    serde_json::from_slice(&output.stdout).unwrap()
}

#[track_caller]
fn of_kind(documents: &[Value], kind: &str) -> Value {
    let found: Vec<_> = documents
        .iter()
        .filter(|document| document["kind"] == kind)
        .collect();
    assert_eq!(found.len(), 1, "{kind}");
    found[0].clone()
}

fn validate(file: &Path) -> Output {
    let mut command = Command::new(tool("kubernetes-validate"));
    command.arg("--strict").arg(file);
    process::run(command, b"", Duration::from_secs(60))
}

#[test]
fn fits_the_published_schema() {
    let output = validate(&file()).ok();
    let said = format!("{}{}", output.text(), output.stderr);
    assert_eq!(
        said.matches(" passed for resource ").count(),
        documents().len(),
        "{said}"
    );

    let folder = temporary_folder();
    let wrong = folder.path().join("wrong.yaml");
    let text = std::fs::read_to_string(file()).unwrap();
    std::fs::write(
        &wrong,
        text.replace("readOnlyRootFilesystem", "readOnlyFilesystem"),
    )
    .unwrap();
    validate(&wrong).failed();
}

/// What of a pod is not within Pod Security "restricted", as Kubernetes' documentation lists the controls.
fn unrestricted(pod: &Value) -> Vec<String> {
    let mut found = Vec::new();
    let mut deny = |wrong: bool, what: &str| {
        if wrong {
            found.push(what.to_owned());
        }
    };
    for field in ["hostNetwork", "hostPID", "hostIPC"] {
        deny(pod[field] == true, field);
    }
    let allowed = [
        "configMap",
        "csi",
        "downwardAPI",
        "emptyDir",
        "ephemeral",
        "persistentVolumeClaim",
        "projected",
        "secret",
    ];
    for volume in pod["volumes"].as_array().into_iter().flatten() {
        let kinds = volume
            .as_object()
            .unwrap()
            .keys()
            .filter(|key| *key != "name");
        for kind in kinds {
            deny(!allowed.contains(&kind.as_str()), &format!("volume {kind}"));
        }
    }
    let of_pod = &pod["securityContext"];
    deny(of_pod["sysctls"].is_array(), "sysctls");
    let containers = ["initContainers", "containers", "ephemeralContainers"];
    for container in containers
        .iter()
        .flat_map(|list| pod[*list].as_array().into_iter().flatten())
    {
        let own = &container["securityContext"];
        let either = |field: &str| {
            if own[field].is_null() {
                of_pod[field].clone()
            } else {
                own[field].clone()
            }
        };
        deny(own["privileged"] == true, "privileged");
        deny(
            own["allowPrivilegeEscalation"] != false,
            "allowPrivilegeEscalation",
        );
        deny(either("runAsNonRoot") != true, "runAsNonRoot");
        deny(either("runAsUser") == 0, "runAsUser");
        let profile = &either("seccompProfile")["type"];
        deny(
            profile != "RuntimeDefault" && profile != "Localhost",
            "seccompProfile",
        );
        deny(
            own["capabilities"]["drop"] != json!(["ALL"]),
            "capabilities.drop",
        );
        deny(!own["capabilities"]["add"].is_null(), "capabilities.add");
        let ports = container["ports"].as_array().into_iter().flatten();
        deny(
            ports.into_iter().any(|port| !port["hostPort"].is_null()),
            "hostPort",
        );
        // Not of the standard, but of ours.
        deny(
            own["readOnlyRootFilesystem"] != true,
            "readOnlyRootFilesystem",
        );
        deny(
            container["resources"]["limits"]["memory"].is_null(),
            "limits.memory",
        );
    }
    found
}

#[test]
fn pod_security_is_restricted() {
    let documents = documents();
    let pod = of_kind(&documents, "Deployment")["spec"]["template"]["spec"].clone();
    assert_eq!(unrestricted(&pod), Vec::<String>::new());
    let namespace = of_kind(&documents, "Namespace");
    assert_eq!(
        namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"],
        "restricted"
    );

    for (pointer, value, what) in [
        ("/hostNetwork", json!(true), "hostNetwork"),
        (
            "/volumes/0",
            json!({ "name": "x", "hostPath": { "path": "/" } }),
            "volume hostPath",
        ),
        (
            "/securityContext/runAsNonRoot",
            json!(false),
            "runAsNonRoot",
        ),
        (
            "/securityContext/seccompProfile/type",
            json!("Unconfined"),
            "seccompProfile",
        ),
        (
            "/containers/0/securityContext/allowPrivilegeEscalation",
            json!(true),
            "allowPrivilegeEscalation",
        ),
        (
            "/containers/0/securityContext/capabilities/drop",
            json!(["NET_RAW"]),
            "capabilities.drop",
        ),
        (
            "/containers/0/securityContext/readOnlyRootFilesystem",
            json!(false),
            "readOnlyRootFilesystem",
        ),
    ] {
        let mut pod = pod.clone();
        match pod.pointer_mut(pointer) {
            Some(place) => *place = value,
            None => pod[&pointer[1..]] = value,
        }
        assert_eq!(unrestricted(&pod), [what], "{pointer}");
    }
}

#[test]
fn its_parts_fit_each_other() {
    let documents = documents();
    let deployment = of_kind(&documents, "Deployment");
    let template = &deployment["spec"]["template"];
    let pod = &template["spec"];
    let container = &pod["containers"][0];
    assert_eq!(pod["containers"].as_array().unwrap().len(), 1);
    for selector in [
        &deployment["spec"]["selector"]["matchLabels"],
        &of_kind(&documents, "Service")["spec"]["selector"],
        &of_kind(&documents, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
    ] {
        for (label, value) in selector.as_object().unwrap() {
            assert_eq!(template["metadata"]["labels"][label], *value, "{label}");
        }
    }
    let mounted = |kind: &str| -> String {
        let volumes = pod["volumes"].as_array().unwrap();
        let volume = volumes
            .iter()
            .find(|volume| !volume[kind].is_null())
            .expect(kind);
        let mounts = container["volumeMounts"].as_array().unwrap();
        let mount = mounts
            .iter()
            .find(|mount| mount["name"] == volume["name"])
            .expect(kind);
        mount["mountPath"].as_str().unwrap().to_owned()
    };
    assert_eq!(mounted("configMap"), "/config");
    assert_eq!(mounted("persistentVolumeClaim"), "/var/lib/warmdock");
    let secrets = mounted("secret");

    let config = of_kind(&documents, "ConfigMap")["data"]["app_config.json"]
        .as_str()
        .unwrap()
        .to_owned();

    // Nobody serves with a token that everybody can read: the Secret is made by the command at the head, with all that the
    // configuration looks for.
    let mut kinds = documents.iter().map(|document| &document["kind"]);
    assert!(kinds.all(|kind| kind != "Secret"));
    let volumes = pod["volumes"].as_array().unwrap();
    let name = volumes
        .iter()
        .find_map(|volume| volume["secret"]["secretName"].as_str())
        .unwrap();
    let text = std::fs::read_to_string(file()).unwrap();
    let command = format!("# kubectl --namespace warmdock create secret generic {name} ");
    assert!(text.contains(&command), "no {command}");
    let folder = temporary_folder();
    let here = folder.path().join("secrets");
    std::fs::create_dir(&here).unwrap();
    let place = format!("\"{secrets}/");
    let names: Vec<_> = config
        .split(&place)
        .skip(1)
        .map(|rest| rest.split('"').next().unwrap())
        .collect();
    assert!(
        !names.is_empty(),
        "secrets are mounted where the configuration looks for them"
    );
    for name in names {
        assert!(text.contains(&format!("={name}=")), "nobody makes {name}");
        std::fs::write(here.join(name), name).unwrap();
    }

    // The service takes the configuration, with the secrets in another folder.
    let path = folder.path().join("app_config.json");
    std::fs::write(&path, config.replace(&secrets, here.to_str().unwrap())).unwrap();
    let checked = warmdock::run(&["check", "--config", path.to_str().unwrap()]).ok();
    let listens: Value = serde_json::from_str(&checked.text()).unwrap();
    let port = container["ports"][0]["containerPort"].to_string();
    let address = listens["listen"]["http"].as_str().unwrap();
    assert!(
        address.ends_with(&format!(":{port}")),
        "{address} is not the port {port}"
    );
    // musl's resolver gives up a search in whose domains one lookup fails.
    assert_eq!(
        pod["dnsConfig"]["options"],
        json!([{ "name": "ndots", "value": "1" }])
    );
    for probe in ["startupProbe", "livenessProbe", "readinessProbe"] {
        let path = container[probe]["httpGet"]["path"].as_str().unwrap();
        assert!(
            ["/healthz", "/readyz"].contains(&path),
            "{probe} asks {path}"
        );
    }
}
