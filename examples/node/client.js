// Asks a layertap server for layers of a photograph and of a tensor, and, if a model of texts is
// named, for one of its layers:
//
//   node client.js HOST:PORT [MODEL] [PHOTO] [TEXT_MODEL] [TEXT_LAYER]

import { readFile } from "node:fs/promises";
import { setTimeout as sleep } from "node:timers/promises";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";
import grpc from "@grpc/grpc-js";
import { loadSync } from "@grpc/proto-loader";
import health from "grpc-health-check";
import { fromFloats, nameOf, toFloats, toIntegers } from "./elements.js";

const READY_WITHIN_MS = 60_000;
const ANSWER_WITHIN_MS = 60_000;

const here = (path) => fileURLToPath(new URL(path, import.meta.url));

// Nothing is generated: the .proto files are read as the program starts. Sizes come as numbers,
// since none of a shape is near 2^53, and the values of enums by their names.
const definition = loadSync("layertap/v1/feature_service.proto", {
  includeDirs: [here("../../proto")],
  longs: Number,
  enums: String,
  defaults: true,
});
const { FeatureService } = grpc.loadPackageDefinition(definition).layertap.v1;
const Health = grpc.makeClientConstructor(health.service, "Health");

const deadline = (milliseconds) => ({ deadline: Date.now() + milliseconds });

/** Returns once the server's models are loaded. */
async function waitUntilReady(address) {
  const client = new Health(address, grpc.credentials.createInsecure());
  const check = promisify(client.check.bind(client));
  // One deadline for all attempts, and waitForReady for a server that does not listen yet; it
  // listens before its models are loaded.
  const metadata = new grpc.Metadata({ waitForReady: true });
  const options = deadline(READY_WITHIN_MS);
  while ((await check({}, metadata, options)).status !== "SERVING") {
    await sleep(200);
  }
  client.close();
}

/** A float32 input whose element i is (i % 255) / 255. */
function rampTensor(shape) {
  const count = shape.reduce((product, size) => product * size, 1);
  const values = Float32Array.from({ length: count }, (_, i) => (i % 255) / 255);
  return { dtype: "DATA_TYPE_FLOAT32", shape, data: fromFloats(values) };
}

/** Prints a line for each tensor of the reply, and one for each intervention of the request. */
async function show(extract, what, request) {
  const { tensors } = await extract(request, deadline(ANSWER_WITHIN_MS));
  const isReport = ({ name }) => name.startsWith("interventions.");
  for (const tensor of tensors.filter((tensor) => !isReport(tensor))) {
    const { name, dtype, shape } = tensor;
    console.log(`${what} ${name} ${nameOf(dtype)} ${shape.join("x")} ${summary(tensor)}`);
  }
  const reports = Object.fromEntries(tensors.filter(isReport).map((each) => [each.name, each]));
  if (request.interventions) showInterventions(reports);
}

/** The sum and the first of a tensor's elements. */
function summary(tensor) {
  if (tensor.dtype === "DATA_TYPE_INT64") {
    const values = toIntegers(tensor); // BigInts, which a template writes without their n.
    return `sum=${values.reduce((sum, value) => sum + value, 0n)} first=${values[0]}`;
  }
  const values = toFloats(tensor);
  let sum = 0; // A number is a double.
  for (const value of values) sum += value;
  return `sum=${sum.toFixed(4)} first=${values[0].toFixed(6)}`;
}

/**
 * Prints a line for each intervention: the calls of modules and the elements that it selected, those
 * whose value changed, and the norm of the selected elements before and after.
 */
function showInterventions(reports) {
  const [calls, elements, changed] = ["calls", "elements", "changed"].map((name) =>
    toIntegers(reports[`interventions.${name}`]),
  );
  const norms = toFloats(reports["interventions.norm"]); // [N, 2]
  calls.forEach((count, i) => {
    const [before, after] = norms.subarray(2 * i, 2 * i + 2);
    const counts = `calls=${count} elements=${elements[i]} changed=${changed[i]}`;
    console.log(`intervention ${i} ${counts} norm=${before.toFixed(4)}->${after.toFixed(4)}`);
  });
}

/**
 * Prints how the server refuses a request: the status says what to do about it, the trailing
 * metadata which of the server's errors it is.
 */
async function showRefusal(extract, request) {
  const error = await extract(request, deadline(ANSWER_WITHIN_MS)).then(
    () => Promise.reject(new Error("the server was expected to refuse the request")),
    (error) => error,
  );
  const kind = error.metadata.get("layertap-error").join();
  console.log(`error ${grpc.status[error.code]} ${kind} ${error.details}`);
}

async function main(
  address,
  model = "resnet18",
  photo = here("../images/grace_hopper.jpg"),
  textModel,
  textLayer = "encoder.layer.11",
) {
  if (!address) {
    throw new Error("usage: node client.js HOST:PORT [MODEL] [PHOTO] [TEXT_MODEL] [TEXT_LAYER]");
  }
  const image = await readFile(photo);
  await waitUntilReady(address);

  const client = new FeatureService(address, grpc.credentials.createInsecure(), {
    // A few layers of a batch are soon over the 4 MB that gRPC receives by default; -1 is no limit.
    "grpc.max_receive_message_length": -1,
  });
  const extract = promisify(client.extract.bind(client));

  const images = [{ images: [image] }];
  const pooled = { layer: "avgpool", capture: "CAPTURE_INPUT" };
  await show(extract, "photo", { model, images, layers: [{ layer: "layer1" }, pooled] });
  const inputs = [rampTensor([1, 3, 224, 224])];
  await show(extract, "tensor", { model, inputs, layers: [{ layer: "avgpool" }] });
  // Where in the photo layer1 raises the largest element of avgpool: a class activation map.
  const where = { layer: "layer1", capture: "CAPTURE_GRADIENT", method: "METHOD_GRAD_CAM" };
  const objective = [{ layer: "avgpool", measure: "MEASURE_MAXIMUM" }];
  await show(extract, "map", { model, images, layers: [where], objective });
  // What avgpool is given without channels 0 and 1 of layer1, and with those from 32 on halved.
  const first = { axis: "AXIS_CHANNEL", index: [0, 1] };
  const rest = { axis: "AXIS_CHANNEL", begin: 32 };
  const interventions = [
    { layer: "layer1", select: [first], operation: "OPERATION_ZERO" },
    { layer: "layer1", select: [rest], operation: "OPERATION_SCALE", factor: 0.5 },
  ];
  await show(extract, "changed", { model, images, layers: [pooled], interventions });
  if (textModel) {
    const texts = [{ texts: ["the cat sat on the mat.", "a bird flew"] }];
    // The mean of each text's tokens; the server tokenises the texts and leaves padding out.
    const mean = { layer: textLayer, reduction: "REDUCTION_GLOBAL_AVERAGE_POOL" };
    await show(extract, "text", { model: textModel, texts, layers: [mean] });
  }
  await showRefusal(extract, { model, images, layers: [{ layer: "no.such.layer" }] });
  client.close();
}

main(...process.argv.slice(2)).catch((error) => {
  console.error(error.message);
  process.exit(1);
});
