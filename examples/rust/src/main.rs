//! Asks a layertap server for layers of a photograph and of a tensor, and, if a model of texts is
//! named, for one of its layers: `client HOST:PORT [MODEL] [PHOTO] [TEXT_MODEL] [TEXT_LAYER]`.

mod elements;

use std::error::Error;
use std::time::Duration;

use tonic::Status;
use tonic::transport::{Channel, Endpoint};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

use v1::feature_service_client::FeatureServiceClient;
use v1::{
    Axis, AxisSelection, Capture, DataType, ExtractRequest, ImageBatch, Intervention,
    LayerSelection, Measure, Method, ObjectiveTerm, Operation, Reduction, Tensor, TextBatch,
};

/// What build.rs made of the contract in proto/layertap/v1.
mod v1 {
    tonic::include_proto!("layertap.v1");
}

const USAGE: &str = "usage: client HOST:PORT [MODEL] [PHOTO] [TEXT_MODEL] [TEXT_LAYER]";
const PHOTO: &str = "../images/grace_hopper.jpg";
const TEXT_LAYER: &str = "encoder.layer.11";
const READY_WITHIN: Duration = Duration::from_secs(60);
const ASK_AGAIN: Duration = Duration::from_millis(100);

/// gRPC refuses messages over 4 MB unless told otherwise, and activations are often larger: layer1
/// of a batch of six images already is.
const LARGEST_REPLY: usize = 1 << 30;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let address = arguments.next().ok_or(USAGE)?;
    let model = arguments.next().unwrap_or("resnet18".into());
    let photo = std::fs::read(arguments.next().unwrap_or(PHOTO.into()))?;
    let text_model = arguments.next();
    let text_layer = arguments.next().unwrap_or(TEXT_LAYER.into());

    let channel = Endpoint::from_shared(format!("http://{address}"))?.connect_lazy();
    wait_until_ready(channel.clone()).await?;
    let mut features = FeatureServiceClient::new(channel).max_decoding_message_size(LARGEST_REPLY);

    let images = ImageBatch {
        images: vec![photo],
        ..Default::default()
    };
    let request = ExtractRequest {
        model: model.clone(),
        images: vec![images.clone()],
        layers: vec![layer("layer1"), input_of("avgpool")],
        ..Default::default()
    };
    let reply = features.extract(request).await?.into_inner();
    print("photo", &reply.tensors)?;

    let ramp = elements::tensor(&[1, 3, 224, 224], |i| (i % 255) as f32 / 255.0);
    let request = ExtractRequest {
        model: model.clone(),
        inputs: vec![ramp],
        layers: vec![layer("avgpool")],
        ..Default::default()
    };
    let reply = features.extract(request).await?.into_inner();
    print("tensor", &reply.tensors)?;

    // Where in the photo layer1 raises the largest element of avgpool: a class activation map.
    let request = ExtractRequest {
        model: model.clone(),
        images: vec![images.clone()],
        layers: vec![map_of("layer1")],
        objective: vec![ObjectiveTerm {
            layer: "avgpool".into(),
            measure: Measure::Maximum.into(),
            ..Default::default()
        }],
        ..Default::default()
    };
    let reply = features.extract(request).await?.into_inner();
    print("map", &reply.tensors)?;

    // What avgpool is given without channels 0 and 1 of layer1, and with those from 32 on halved.
    let request = ExtractRequest {
        model: model.clone(),
        images: vec![images.clone()],
        layers: vec![input_of("avgpool")],
        interventions: interventions(),
        ..Default::default()
    };
    let reply = features.extract(request).await?.into_inner();
    let (reports, layers): (Vec<_>, Vec<_>) = reply
        .tensors
        .into_iter()
        .partition(|tensor| tensor.name.starts_with("interventions."));
    print("changed", &layers)?;
    print_interventions(&reports)?;

    if let Some(text_model) = text_model {
        let texts = TextBatch {
            texts: vec!["the cat sat on the mat.".into(), "a bird flew".into()],
            ..Default::default()
        };
        let request = ExtractRequest {
            model: text_model,
            texts: vec![texts],
            layers: vec![mean_of(&text_layer)],
            ..Default::default()
        };
        let reply = features.extract(request).await?.into_inner();
        print("text", &reply.tensors)?;
    }

    let request = ExtractRequest {
        model,
        images: vec![images],
        layers: vec![layer("no.such.layer")],
        ..Default::default()
    };
    match features.extract(request).await {
        Ok(_) => return Err("a layer that does not exist was served".into()),
        Err(status) => print_error(&status),
    }
    Ok(())
}

async fn wait_until_ready(channel: Channel) -> Result<(), Box<dyn Error>> {
    let mut health = HealthClient::new(channel);
    let serving = async {
        loop {
            // An error is no end: until the server listens, connections are refused.
            if let Ok(reply) = health.check(HealthCheckRequest::default()).await
                && reply.get_ref().status() == ServingStatus::Serving
            {
                return;
            }
            tokio::time::sleep(ASK_AGAIN).await;
        }
    };
    tokio::time::timeout(READY_WITHIN, serving)
        .await
        .map_err(|_| format!("the server was not ready within {READY_WITHIN:?}").into())
}

/// What the layer returns.
fn layer(name: &str) -> LayerSelection {
    LayerSelection {
        layer: name.into(),
        ..Default::default()
    }
}

/// What the layer is given; the reply calls it `name:input`.
fn input_of(name: &str) -> LayerSelection {
    LayerSelection {
        capture: Capture::Input.into(),
        ..layer(name)
    }
}

/// The layer's Grad-CAM; the reply calls it `name:grad_cam`.
fn map_of(name: &str) -> LayerSelection {
    LayerSelection {
        capture: Capture::Gradient.into(),
        method: Method::GradCam.into(),
        ..layer(name)
    }
}

/// The mean of each text's tokens; the server tokenises the texts and leaves padding out.
fn mean_of(name: &str) -> LayerSelection {
    LayerSelection {
        reduction: Reduction::GlobalAveragePool.into(),
        ..layer(name)
    }
}

/// Sets channels 0 and 1 of layer1 to zero, and halves those from 32 on.
fn interventions() -> Vec<Intervention> {
    let first = AxisSelection {
        axis: Axis::Channel.into(),
        index: vec![0, 1],
        ..Default::default()
    };
    let rest = AxisSelection {
        axis: Axis::Channel.into(),
        begin: Some(32),
        ..Default::default()
    };
    let zero = Intervention {
        layer: "layer1".into(),
        select: vec![first],
        operation: Operation::Zero.into(),
        ..Default::default()
    };
    let halve = Intervention {
        layer: "layer1".into(),
        select: vec![rest],
        operation: Operation::Scale.into(),
        factor: Some(0.5),
        ..Default::default()
    };
    vec![zero, halve]
}

/// Prints a line for each tensor.
fn print(what: &str, tensors: &[Tensor]) -> Result<(), String> {
    for tensor in tensors {
        let shape: Vec<_> = tensor.shape.iter().map(i64::to_string).collect();
        println!(
            "{what} {} {} {} {}",
            tensor.name,
            elements::dtype_name(tensor.dtype()),
            shape.join("x"),
            summary(tensor)?,
        );
    }
    Ok(())
}

/// The sum and the first of a tensor's elements.
fn summary(tensor: &Tensor) -> Result<String, String> {
    if tensor.dtype() == DataType::Int64 {
        let elements = elements::integers(tensor)?;
        let first = elements.clone().next().unwrap_or_default();
        let sum: i64 = elements.sum();
        return Ok(format!("sum={sum} first={first}"));
    }
    let elements = elements::floats(tensor)?;
    let first = elements.clone().next().unwrap_or(f32::NAN);
    let sum: f64 = elements.map(f64::from).sum();
    Ok(format!("sum={sum:.4} first={first:.6}"))
}

/// Prints a line for each intervention: the calls of modules and the elements that it selected,
/// those whose value changed, and the norm of the selected elements before and after.
fn print_interventions(reports: &[Tensor]) -> Result<(), String> {
    let report = |name: &str| {
        let found = reports.iter().find(|tensor| tensor.name == name);
        found.ok_or_else(|| format!("the reply has no {name}"))
    };
    let calls = elements::integers(report("interventions.calls")?)?;
    let selected = elements::integers(report("interventions.elements")?)?;
    let changed = elements::integers(report("interventions.changed")?)?;
    let norms: Vec<f32> = elements::floats(report("interventions.norm")?)?.collect(); // [N, 2]
    let counts = calls.zip(selected).zip(changed);
    for (i, (((calls, selected), changed), norm)) in counts.zip(norms.chunks(2)).enumerate() {
        println!(
            "intervention {i} calls={calls} elements={selected} changed={changed} \
             norm={:.4}->{:.4}",
            norm[0], norm[1]
        );
    }
    Ok(())
}

fn print_error(status: &Status) {
    let kind = status.metadata().get("layertap-error");
    let kind = kind.and_then(|value| value.to_str().ok()).unwrap_or("none");
    println!("error {:?} {kind} {}", status.code(), status.message());
}
