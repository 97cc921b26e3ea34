"""webuiapi, which speaks AUTOMATIC1111's API with nearly every field that it has."""

import sys
import threading

import webuiapi
from PIL import Image, ImageDraw

url, key, folder = sys.argv[1:]
api = webuiapi.WebUIApi(baseurl=f"{url}/sdapi/v1", username="any", password=key)
assert api.has_controlnet
api.util_set_model("SD1.5")
assert api.util_get_current_model().startswith("SD1.5 [")
assert "DPM++ 2M" in api.util_get_sampler_names()
assert "karras" in api.util_get_scheduler_names()
small = {"width": 256, "height": 256, "steps": 8, "seed": 2, "cfg_scale": 4.0}

drawn = api.txt2img(prompt="an (apple:1.2) on a teal background", negative_prompt="fog", batch_size=2, **small)
assert [image.size for image in drawn.images] == [(256, 256)] * 2
assert drawn.info["all_seeds"] == [2, 3]
assert "Steps: 8, Sampler: Euler a" in drawn.info["infotexts"][0]
assert drawn.parameters["steps"] == 8
drawn.image.save(f"{folder}/apple.png")

told = api.png_info(drawn.image)
assert told.info == drawn.info["infotexts"][0]
assert told.parameters["Seed"] == "2"

larger = api.txt2img(prompt="an apple", enable_hr=True, hr_scale=2, hr_upscaler=webuiapi.HiResUpscaler.Latent, **small)
assert larger.image.size == (512, 512)
enlarged = api.extra_single_image(drawn.image, upscaler_1=webuiapi.Upscaler.Lanczos, upscaling_resize=1.5)
assert enlarged.image.size == (384, 384)

changed = api.img2img(images=[drawn.image], prompt="a cat", denoising_strength=0.7, **small)
changed.image.save(f"{folder}/cat.png")
mask = Image.new("RGB", (256, 256))
ImageDraw.Draw(mask).ellipse((60, 60, 190, 190), fill="white")
repainted = api.img2img(
    images=[drawn.image], mask_image=mask, inpaint_full_res=False, mask_blur=0, prompt="a cat", **small
)
assert repainted.image.getpixel((4, 4)) == drawn.image.getpixel((4, 4)), "what is black stays"
assert repainted.image.tobytes() != drawn.image.tobytes()
repainted.image.save(f"{folder}/repainted.png")

api.set_options({"CLIP_stop_at_last_layers": 2, "samples_format": "jpeg"})
options = api.get_options()
assert (options["CLIP_stop_at_last_layers"], options["samples_format"]) == (2, "jpeg")
assert api.txt2img(prompt="x", **small).image.format == "JPEG"
api.set_options({"CLIP_stop_at_last_layers": 1, "samples_format": "png"})

assert "canny" in api.controlnet_module_list()
(model,) = [name for name in api.controlnet_model_list() if name.startswith("canny")]
maps = api.controlnet_detect([drawn.image], module="canny")
assert maps.image.size == (256, 256)
units = [
    webuiapi.ControlNetUnit(image=drawn.image, module="canny", model=model, weight=0.8),
    webuiapi.ControlNetUnit(image=maps.image, module="none", model=model, guidance_end=0.5),
]
steered = api.txt2img(prompt="a cat on a teal background", controlnet_units=units, **small)

ended = []
long = small | {"steps": 150, "n_iter": 8}
drawing = threading.Thread(target=lambda: ended.append(api.txt2img(prompt="an apple", **long)))
drawing.start()
while not (progress := api.get_progress())["state"]["job_count"]:
    assert drawing.is_alive(), "it ended before it was seen"
assert progress["state"]["sampling_steps"] == 150
assert api.interrupt()["requests"] == 1
drawing.join()
assert len(ended[0].images) < 8
api.util_wait_for_ready(check_interval=0.1)

for wrong in ({"sampler_name": "Restart"}, {"prompt": "<lora:Nope:1>"}):
    status = 200
    try:
        api.txt2img(**(small | wrong))
    except RuntimeError as error:
        status = error.args[0]
    assert status == 400, wrong
steered.image.save(f"{folder}/steered.png")
